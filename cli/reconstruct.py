"""spikegen reconstruct."""

from pathlib import Path

import click
from spikegen.cli import device, num


@click.command()
@click.argument("run")
@click.option("--num", type=num, default=32, show_default=True, help="How many test images.")
@click.option("--out", type=click.Path(path_type=Path), help="The grid.  [default: RUN/reconstructions.png]")
@device
def command(run: str, num: int, out: Path | None, device: str) -> None:
    """Pass test images through RUN and back: a grid with each row of images above its reconstructions."""
    from spikegen.plots import check_picture, save_pairs
    from spikegen.runs import default_output, open_vae, reconstruct_test

    out = out or default_output(run, "reconstructions.png")
    check_picture(out)
    model, config = open_vae(run, device)
    images, copies, error = reconstruct_test(run, model, config, num)
    save_pairs(images, copies, out)
    click.echo(f"{out}\nmean squared error on images in [-1, 1]: {error:.4f}")
