"""spikegen score."""

from pathlib import Path
from typing import Any

import click
from spikegen.cli import device, sampling_options


@click.command()
@click.argument("source")
@click.option("--reference", help="NAME or NAME:train of a data set, or a folder.  [default: the run's test split]")
@click.option("--metrics", help="Comma-separated, such as fid,recall,mse; see docs/config.md.  [default: the run's]")
@click.option("--num", type=click.IntRange(min=2), help="How many images to generate.  [default: the run's]")
@click.option("--extractor", help="cnn, cnn:NAME, inception, inception:PATH or autoencoder:PATH.  [default: the run's]")
@click.option("--protocol", help="fsvae: 5,120 images, FAD and reconstruction, as FSVAE and ESVAE score.")
@click.option("--statistics", type=click.Path(path_type=Path), help="An .npz file of real features, as published.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where to write JSON.  [default: SOURCE/scores.json of a run, else ./scores.json]",
)
@sampling_options
@device
def command(
    source: str, reference: str | None, metrics: str | None, num: int | None, extractor: str | None,
    protocol: str | None, statistics: Path | None, out: Path | None, device: str,
    **sampling: Any,
) -> None:  # fmt: skip
    """Score SOURCE, a run, a saved model or a folder of images, against real images; a classifier by its accuracy."""
    from spikegen.runs import require_scores, save_scores, scores_path
    from spikegen.sampling import Sampling
    from spikegen.scoring import score
    from spikegen.spec import parse

    path = out or scores_path(source)
    require_scores(path)
    names = None if metrics is None else tuple(metrics.split(","))
    result = score(
        source, reference, names, num, extractor, device, protocol, statistics, parse(Sampling, sampling, "sampling")
    )
    save_scores(path, result.to_json())
    click.echo(f"{result.table()}\n{path}")
    if "confusion" in result.settings:
        from spikegen.grading import draw_confusion

        picture = path.with_name("confusion.png" if path.stem == "scores" else f"{path.stem}-confusion.png")
        draw_confusion(result.settings["confusion"], result.settings["classes"], picture)
        click.echo(picture)
