"""The command line: every command is a door to one library function.

Exit codes: 0 good, 2 wrong usage or bad input (one line says what and what to do), 1 a failure of ours, 3 a rejection
where `gate --exit-code` asked for it.
"""

from __future__ import annotations

import sys
import tempfile
import traceback

import typer

from softteacher.cli import data, demo, evaluation, registry, serving, training
from softteacher.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Soft Teacher: a detector from few labelled and many unlabelled images.",
)
for group in (data, training, evaluation, serving, registry, demo):
    app.add_typer(group.app)


def main() -> None:
    """Entry point: runs a command and turns errors into exit codes."""
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
