"""The command line: every command is a door to one library function.

Exit codes: 0 good, 2 wrong usage or bad input (one line says what and what to do), 1 a failure of ours, 3 a rejection
where `gate --exit-code` asked for it, 130 and 143 ended by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from types import FrameType

import typer

from softteacher.cli import data, demo, evaluation, registry, serving, training
from softteacher.cli.options import refuse_blank
from softteacher.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Soft Teacher: a detector from few labelled and many unlabelled images.",
)
for group in (data, training, evaluation, serving, registry, demo):
    for command in group.app.registered_commands:
        if command.callback:
            refuse_blank(command.callback)
    app.add_typer(group.app)


def main() -> None:
    """Entry point: runs a command and turns errors into exit codes."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except UserError as e:
        print("error:", " ".join(str(e).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception:
        trace = traceback.format_exc()
        try:
            with tempfile.NamedTemporaryFile("w", prefix="softteacher-error-", suffix=".log", delete=False) as log:
                log.write(f"{sys.argv}\n{trace}")
            where = f"details in {log.name}"
        except OSError as e:
            where = f"details could not be written: {e.strerror}"
        print(f"internal error: {trace.strip().splitlines()[-1]} ({where}; please report it)", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: FrameType | None) -> None:
    """Unwind as at Ctrl-C, so that no scratch folder stays; a second signal must not stop that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
