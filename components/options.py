"""Options of a command, made from a function's signature and docstring, so that nothing is written twice."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import docstring_parser
import typer

from softteacher.cli.options import not_blank

Command = TypeVar("Command", bound=Callable[..., None])


def options_of(
    function: Callable[..., Any], *, flags: Mapping[str, str] | None = None, types: Mapping[str, Any] | None = None
) -> list[inspect.Parameter]:
    """One option for each parameter of a function, with its default; the help is that of the docstring.

    Those without a default must not be blank.

    Args:
        function: With types and a Google style docstring.
        flags: What to call the option where that isn't the parameter's name: `{"overrides": "--set"}`.
        types: Narrower types for the command line than the function may have (KFP knows no `Literal`).

    Example:
        >>> def f(fold: int = 1) -> None:
        ...     '''Train.
        ...
        ...     Args:
        ...         fold: Number of the fold.
        ...     '''
        >>> [str(option.default) for option in options_of(f)]
        ['1']
    """
    described = {p.arg_name: p.description or "" for p in docstring_parser.parse(inspect.getdoc(function) or "").params}
    options = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        text = " ".join(described[name].split()).rstrip(".")
        required = parameter.default is parameter.empty  # an optional one may be empty, which is none
        flag = [flags[name]] if flags and name in flags else []
        option = typer.Option(*flag, help=text, callback=not_blank if required else None)
        kind = (types or {}).get(name, parameter.annotation)
        # by keyword only: one without a default may then follow one with
        options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option]))
    return options


def with_options(command: Command, options: list[inspect.Parameter]) -> Command:
    """Give a command options besides its own; it finds them in its `**` parameter."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}  # typer looks at both
    return command
