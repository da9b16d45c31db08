"""The command line: one click command a file, imported when it is called, so that `--help` is instant."""

import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

COMMANDS = {
    "train": "Train a model on a preset or a YAML config.",
    "sample": "Draw images from a trained model.",
    "reconstruct": "Pass test images through a trained model and back.",
    "score": "Compute FID, IS and other scores of a model or a folder.",
    "plot": "Draw curves, spikes, attention and more of a run.",
    "profile": "Count parameters, operations, spikes and energy an image.",
    "export": "Write a model for other tools: NIR, ONNX, torch.export.",
    "configs": "List the presets.",
}


class _Lazy(click.Group):
    """Knows its commands by name and help; imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"spikegen.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spikegen-vae", prog_name="spikegen")
def main() -> None:
    """Image generation with spiking neural networks."""


device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
num = click.IntRange(min=1)


def sampling_options(command: F) -> F:
    """What `spikegen.sampling.Sampling` holds."""
    positive = click.FloatRange(min=0, min_open=True)
    for option in (
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the model."
        ),
        click.option(
            "--candidates",
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Draw what the model's own head takes for another class again, until so many draws.",
        ),
        click.option("--guidance", type=click.FloatRange(min=0), help="Of the learnt prior.  [default: the run's]"),
        click.option("--temperature", type=positive, help="Of the learnt prior's bits.  [default: the run's]"),
        click.option("--passes", type=click.IntRange(1, 2**16), help="Of the learnt prior.  [default: the run's]"),
    ):
        command = option(command)
    return command


def entry() -> None:
    """Run a command; exit 0 done, 2 a mistake in the call or the config, 1 any other failure, 130 interrupted."""
    warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
    try:
        sys.exit(main(standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        where = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(" ".join(error.format_message().split()) + where, 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except Exception as error:
        _explain(error)


def _explain(error: Exception) -> None:
    from spikegen.spec import UserError

    kind = type(error).__name__
    if isinstance(error, UserError):
        _fail(str(error), 2)
    if kind == "Interrupted":
        _fail(str(error), 130)
    if isinstance(error, OSError) or kind in ("Diverged", "OutOfMemoryError"):
        _fail(getattr(error, "strerror", None) or str(error), 1)
    if os.environ.get("WORLD_SIZE", "1") != "1" and re.search("Connection (closed|reset) by peer", str(error)):
        _fail(f"another process of this training has stopped, and says why ({str(error).splitlines()[0]})", 1)
    traceback.print_exc()
    _fail(f"{kind}: this is a bug in spikegen; please report it with the lines above", 1)


def _fail(line: str, code: int) -> None:
    click.echo("Error: " + " ".join(line.splitlines()), err=True)
    sys.exit(code)
