"""The command `edgevl`: finds a verb by name, loads only that one, and turns errors into sentences and exit codes.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted. Knows the names of the verbs and nothing of what they do.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from edgevl import __version__
from edgevl.errors import EdgevlError

# name -> one line for the overview, so that listing verbs imports none of them
VERBS = {
    "demo": "Assemble the demo checkpoint.",
    "quantize": "Make an int4 AWQ checkpoint.",
    "measure": "Compare a quantized checkpoint with its original.",
    "build": "Build a bundle for a target.",
    "chat": "Talk to a bundle about text and pictures.",
    "caption": "Caption pictures and folders to JSON lines.",
    "bench": "Measure prefill, decode and bandwidth of a bundle.",
    "inspect": "Show what is in a bundle or checkpoint.",
    "targets": "List what bundles can be built for.",
    "doctor": "Say what this machine has and lacks.",
}


class Verbs(click.Group):
    """The group of verbs, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of their use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's click command from `edgevl.commands.NAME`, or None."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"edgevl.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, without importing a verb."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="edgevl %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def root(debug: bool) -> None:
    """A document-reading vision-language model on small machines."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    _prepare_stdout()
    sys.exit(_run(given, debug))


def _run(given: list[str], debug: bool) -> int:
    try:
        result: Any = root.main(given, prog_name="edgevl", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return 130
    except KeyboardInterrupt:
        click.echo("edgevl: interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # whoever read our answer has gone; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EdgevlError as error:
        if debug:
            raise
        click.echo(f"edgevl: {error}", err=True)
        return error.exit_code
    except MemoryError:
        if debug:
            raise
        click.echo("edgevl: the memory of this machine is used up; close other programs or choose less", err=True)
        return 1
    except OSError as error:
        if debug:
            raise
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        click.echo(f"edgevl: {where}{error.strerror or error}; --debug shows where", err=True)
        return 1
    except ImportError as error:
        if debug:
            raise
        click.echo(f"edgevl: {error}; the installation is not whole, `edgevl doctor` says what is missing", err=True)
        return 1
    except Exception as error:
        if debug:
            raise
        click.echo(f"edgevl: {type(error).__name__}: {error}; this is a bug, --debug shows where", err=True)
        return 1


def _prepare_stdout() -> None:
    """An answer never fails for a character that the terminal's encoding lacks, nor for a closed stdout."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
