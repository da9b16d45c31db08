"""Draw a folder data set of coloured shapes, four classes, to see that presets for folders of images run.

python tools/make_shapes.py FOLDER --size 64
"""

import random
from pathlib import Path

import click
from PIL import Image, ImageDraw

LABELS = ("circle", "cross", "square", "triangle")


def draw_shape(label: str, size: int, source: random.Random) -> Image.Image:
    """One bright shape on a dark ground, at a place and of a size drawn from `source`."""
    image = Image.new("RGB", (size, size), tuple(source.randrange(100) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    r = source.randrange(size // 8, size // 3)
    x, y = (source.randrange(r + 1, size - 1 - r) for _ in range(2))
    left, top, right, bottom = x - r, y - r, x + r, y + r
    colour = tuple(source.randrange(120, 256) for _ in range(3))
    if label == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif label == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif label == "triangle":
        pen.polygon(((x, top), (left, bottom), (right, bottom)), fill=colour)
    else:
        pen.line((left, top, right, bottom), fill=colour, width=max(1, size // 12))
        pen.line((left, bottom, right, top), fill=colour, width=max(1, size // 12))
    return image


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=click.IntRange(min=16), default=64, help="Height and width in pixels.  [default: 64]")
@click.option("--train", type=click.IntRange(min=1), default=500, help="Training images a class.  [default: 500]")
@click.option("--test", type=click.IntRange(min=1), default=100, help="Test images a class.  [default: 100]")
@click.option("--seed", type=int, default=0, help="Of every draw.  [default: 0]")
def main(folder: Path, size: int, train: int, test: int, seed: int) -> None:
    """Write FOLDER/train/LABEL/0000.png, ..., and FOLDER/test."""
    source = random.Random(seed)
    for split, count in (("train", train), ("test", test)):
        for label in LABELS:
            into = folder / split / label
            into.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                draw_shape(label, size, source).save(into / f"{k:04d}.png")


if __name__ == "__main__":
    main()
