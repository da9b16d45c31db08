"""spikegen configs."""

import click


@click.command()
def command() -> None:
    """List the presets, one a line."""
    from spikegen.config import presets

    names = presets()
    for name, line in names.items():
        click.echo(f"{name:<{max(map(len, names))}}  {line}")
