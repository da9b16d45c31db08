"""spikegen plot."""

import click
from spikegen.cli import device


@click.command()
@click.argument("run")
@click.option("--num", default=8, show_default=True, type=click.IntRange(2, 64), help="Images to show.")
@click.option(
    "--many",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Held-out images that mean responses, silent channels and firing rates are of.",
)
@device
def command(run: str, num: int, many: int, device: str) -> None:
    """Draw what explains RUN into RUN/plots: curves, attention, responses, firing rates, and images if it makes any."""
    from spikegen.figures import draw_all
    from spikegen.plots import check_picture
    from spikegen.runs import Run, open_run
    from spikegen.spec import UserError

    model, config = open_run(run, device)
    if config is None:
        raise UserError(f"{run} has no config.yaml that names its data; give a run folder")
    check_picture(Run(run).path / "plots" / "curves.png")
    for path in draw_all(Run(run), model, config, num, many):
        click.echo(path)
