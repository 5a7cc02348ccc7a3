"""Options of a command from a function."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from components.options import options_of, with_options


def pipeline(data: str, overrides: list[str] = [], fold: int = 1, fast: bool = False) -> None:  # noqa: B006
    """Do something.

    Args:
        data: Folder or
            prefix.
        overrides: Settings.
        fold: Number of the fold.
        fast: In a hurry.
    """


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    def command(out: str = "here", **given: Any) -> None:
        print(out, given)

    app.command()(with_options(command, options_of(pipeline, flags={"overrides": "--set"})))
    return app


def test_options_arrive(app):
    done = CliRunner().invoke(app, ["--data", "d", "--set", "a=1", "--set", "b=2", "--fast", "--out", "there"])
    assert done.output == "there {'data': 'd', 'overrides': ['a=1', 'b=2'], 'fold': 1, 'fast': True}\n"


@pytest.mark.parametrize("arguments", [[], ["--data", "d", "--fold", "one"], ["--data", "d", "--overrides", "a=1"]])
def test_what_the_signature_refuses(app, arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_only_what_has_no_default_must_not_be_empty(app):
    assert "it is empty; give a value" in CliRunner().invoke(app, ["--data", ""]).output
    assert CliRunner().invoke(app, ["--data", "d", "--set", ""]).exit_code == 0


def test_help_is_the_docstrings(app):
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "Folder or prefix [required]" in text
    assert "Number of the fold [default: 1]" in text


def test_a_parameter_without_a_description_is_a_mistake():
    def undescribed(data: str) -> None:
        """Do something."""

    with pytest.raises(KeyError, match="data"):
        options_of(undescribed)
