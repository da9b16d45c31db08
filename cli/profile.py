"""spikegen profile."""

import click
from spikegen.cli import device


@click.command()
@click.argument("run")
@device
def command(run: str, device: str) -> None:
    """Count what one image of RUN costs: operations, spikes and energy a layer, for sampling and reconstruction."""
    from spikegen.energy import report
    from spikegen.runs import open_run

    model, config = open_run(run, device)
    click.echo(report(model, config))
