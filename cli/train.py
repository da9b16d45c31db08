"""spikegen train."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from spikegen.cli import device

if TYPE_CHECKING:
    from spikegen.config import Config


@click.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.  [default: runs/CONFIG]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of --out.")
@click.option("--dry-run", is_flag=True, help="Print the resolved config and build the model without training it.")
@device
def command(
    config: str, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool, device: str
) -> None:
    """Train CONFIG, a preset's name (see `spikegen configs`) or a YAML file."""
    from spikegen.config import dump_config, load_config

    resolved = load_config(config, overrides)
    if dry_run:
        from spikegen.training import dry_run as build

        summary = build(resolved)
        click.echo(dump_config(resolved), nl=False)
        click.echo(summary + _mixture(resolved), err=True)
        return
    from spikegen.training import train

    click.echo(train(resolved, out or Path("runs", Path(config).stem), resume=resume, device=device))


def _mixture(config: "Config") -> str:
    """What a learnt prior has beside its parameters."""
    import torch

    from spikegen.training import build_model

    if config.prior is None:
        return ""
    with torch.device("meta"):
        prior = build_model(config, config.data.class_names()).add_prior(config.prior.network)
    return f"; and {prior.mixture.size:,} numbers of the prior's mixture"
