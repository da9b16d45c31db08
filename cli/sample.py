"""spikegen sample."""

from pathlib import Path
from typing import Any

import click
from spikegen.cli import device, num, sampling_options


@click.command()
@click.argument("run")
@click.option("--num", type=num, default=64, show_default=True, help="How many images.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--label", type=int, help="The class of every image, where the model is conditional.")
@click.option("--out", type=click.Path(path_type=Path), help="The grid.  [default: RUN/samples.png]")
@click.option("--images", type=click.Path(path_type=Path), help="A new or empty folder for one file an image.")
@sampling_options
@device
def command(
    run: str, num: int, seed: int, label: int | None, out: Path | None, images: Path | None, device: str,
    **sampling: Any,
) -> None:  # fmt: skip
    """Draw images from RUN: a run folder, a saved model, or a Hugging Face hub id."""
    from spikegen.plots import check_folder, check_picture, save_grid, write_images
    from spikegen.runs import default_output, open_vae
    from spikegen.sampling import Sampling, generate
    from spikegen.spec import parse

    out = out or (None if images else default_output(run, "samples.png"))
    check_picture(out)
    check_folder(images)
    model, _ = open_vae(run, device)
    batches = write_images(generate(model, num, seed, label, parse(Sampling, sampling, "sampling")), images)
    if out:
        save_grid(batches, out)
    click.echo("\n".join(str(path) for path in (out, images) if path))
