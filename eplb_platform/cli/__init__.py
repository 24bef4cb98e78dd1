"""The `eplb` command. Bad input ends it with exit code 2 and one line on standard error, no traceback."""

from __future__ import annotations

import os
import sys

BAD_INPUT = 2
INTERRUPTED = 130


class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that the command prints."""


def bad_input(command: str, error: Exception) -> BadInput:
    """The one line that the command prints for `error`; it names the command once."""
    message = str(error)
    return BadInput(message if message.startswith(f"{command}: ") else f"{command}: {message}")


def run(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default) and return its exit code."""
    import typer

    from eplb_platform.cli.application import application

    try:
        code = application(args=arguments, prog_name="eplb", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        return _say(f"{error.format_message()} (see {context.command_path if context else 'eplb'} --help)")
    except BadInput as error:
        return _say(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    # Products of small matrices: many threads wait for each other longer than they compute, and the more, the
    # busier the machine is. Read when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(run())


def _say(message: str) -> int:
    """Print an error on one line, whatever it holds."""
    print("eplb:", *message.split(), file=sys.stderr)
    return BAD_INPUT
