"""spikegen profile."""

import click
from spikegen.cli import device


@click.command()
@click.argument("run")
@click.option(
    "--joules",
    type=click.Choice(["45nm-fp32", "45nm-fp16", "45nm-int8"]),
    default="45nm-fp32",
    show_default=True,
    help="What an operation takes.",
)
@device
def command(run: str, joules: str, device: str) -> None:
    """Count what one image of RUN costs: operations, spikes and energy a layer, beside an ordinary network's."""
    from spikegen.profiling import report
    from spikegen.runs import open_run

    model, config = open_run(run, device)
    click.echo(report(model, config, joules=joules))
