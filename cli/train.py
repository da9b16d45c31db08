"""spikegen train."""

from pathlib import Path

import click
from spikegen.cli import device


@click.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key; may be repeated.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run folder.  [default: runs/CONFIG; with --resume the run that CONFIG is of]",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of --out.")
@click.option("--dry-run", is_flag=True, help="Print the resolved config and build the model without training it.")
@device
def command(
    config: str, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool, device: str
) -> None:
    """Train CONFIG: a preset's name (see `spikegen configs`), a YAML file or a run's folder."""
    from spikegen.config import config_file, dump_config, load_config

    resolved = load_config(config, overrides)
    if dry_run:
        from spikegen.training import dry_run as build

        summary = build(resolved, device)
        click.echo(dump_config(resolved), nl=False)
        click.echo(summary, err=True)
        return
    from spikegen.runs import Run
    from spikegen.training import train

    file, own = config_file(config), Path("runs", Path(config).stem)
    if resume and file is not None and file.name == "config.yaml":
        own = file.parent
    run = Run(out or own)
    if resume and file is None and not any(key.startswith("scoring") for key in overrides):
        # A preset says nothing of how this run is to be scored.
        resolved = resolved.model_copy(update={"scoring": run.config().scoring})
    click.echo(train(resolved, run.path, resume=resume, device=device))
