"""spikegen export."""

from pathlib import Path

import click


@click.command()
@click.argument("run")
@click.option("--format", "form", type=click.Choice(["nir", "onnx", "torch"]), required=True, help="What others read.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A file that ends in .nir, .onnx or .pt2.")
def command(run: str, form: str, out: Path) -> None:
    """Write RUN for other tools: a classifier or an encoder as NIR, or what draws an autoencoder's images.

    The second is a program from uniform numbers to images: ONNX, or torch's own, which `torch.export.load` reads.
    """
    from spikegen.export_nir import write_nir
    from spikegen.export_sampler import write_sampler
    from spikegen.runs import open_run, open_vae
    from spikegen.storage import require_file

    require_file(out, {"nir": ".nir", "onnx": ".onnx", "torch": ".pt2"}[form])
    if form == "nir":
        says = write_nir(open_run(run, "cpu")[0], out)
    else:
        says = write_sampler(open_vae(run, "cpu")[0], out, "onnx" if form == "onnx" else "torch")
    click.echo(f"{says}\n{out}")
