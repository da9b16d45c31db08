"""Ours beside snnTorch, SpikingJelly and plain torch: `python -m benchmarks`."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from benchmarks import attention_rows, model_rows, scan_rows, score_rows
from benchmarks.growth import growth as grow
from benchmarks.table import COLUMNS, Line, cells, header, markdown
from benchmarks.timing import Setting
from spikegen.memory import keep_freed_memory

ROWS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "lif": scan_rows.lif,
    "stage": scan_rows.stage,
    "tcja": attention_rows.tcja,
    "attention": attention_rows.attention,
    "train": model_rows.train,
    "sample": model_rows.sample,
    "score": score_rows.score,
    "data": score_rows.data,
}


@click.command()
@click.option("--rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these; may be repeated.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Timings that a median is of.")
@click.option("--threads", type=click.IntRange(1), help="torch's threads.  [default: every core]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="Small shapes and two repeats: whether it runs, not how fast.")
@click.option("--stock-allocator", is_flag=True, help="Leave the C library's heap as it is (training tunes it).")
@click.option("--growth", is_flag=True, help="Instead: how a stage's time and memory grow with its shape.")
@click.option("--plot", type=click.Path(path_type=Path), default=Path("docs/performance.png"), show_default=True)
def main(
    rows: tuple[str, ...],
    repeats: int,
    threads: int | None,
    device: str,
    quick: bool,
    stock_allocator: bool,
    growth: bool,
    plot: Path,
) -> None:
    """Print one markdown table of our times, and of the others' over ours (above 1, ours is faster).

    Everything in a row is timed in turns in this process; times are medians. Peers compute the same, which is checked
    first (on stderr).
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: no CUDA device is available; use --device cpu or auto")
    if device == "cpu" and not stock_allocator:
        keep_freed_memory()
    setting = Setting(device, 2 if quick else repeats, quick)
    allocator = "; the C library's heap as it is" if stock_allocator and device == "cpu" else ""
    click.echo(f"{header(device)}; medians of {setting.repeats}{allocator}\n")
    if growth:
        click.echo(grow(setting, plot))
        return
    lines: list[Line] = []
    for name in rows or ROWS:
        sys.stderr.write(f"row: {name}\n")
        lines += ROWS[name](setting)
    click.echo(markdown(COLUMNS, map(cells, lines)))
    click.echo("\nUnder a name: its time (or memory) over ours; above 1, ours takes less.")


if __name__ == "__main__":
    main()
