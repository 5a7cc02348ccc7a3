"""What commands of several modules share."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_type_hints

import typer

from softteacher.errors import UserError
from softteacher.evaluation.shard import Shard


def finite(value: float) -> float:
    """What an option was given, which may not be `nan`: that is neither over nor under any limit."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; see `softteacher config`.")
]
SetLater = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One of export.*, or of what is found, e.g. training.device=cpu."),
]
Preset = Annotated[
    str | None, typer.Option(help="Settings to start from, a+b: b on top of a; see `softteacher config`.")
]
Repository = Annotated[str, typer.Option(help="Triton's model repository, local or s3://.")]
ModelName = Annotated[str, typer.Option(help="Name of the model.")]
ShardText = Annotated[
    str | None,
    typer.Option("--shard", metavar="NUMBER/OF", help="Only this share of the images, e.g. 2/8; OUT is for --join."),
]
Parts = Annotated[
    list[str] | None, typer.Option("--join", help="What a shard wrote, for each; nothing is looked at then.")
]


def not_blank(value: Any) -> Any:
    """The value of an option, if it isn't blank, as that of an unset variable of the shell is.

    Raises:
        BadParameter: it is. A blank path would be the working folder, a blank prefix everything.
    """
    if any(isinstance(one, str) and not one.strip() for one in (value if isinstance(value, list | tuple) else [value])):
        raise typer.BadParameter("it is empty; give a value (is a variable of the shell not set?)")
    return value


def refuse_blank(command: Callable[..., Any]) -> None:
    """Let no option or argument of a command be blank but those that are by default."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        option = get_args(hints[name])[1]
        if parameter.default != "" and option.callback is None:
            option.callback = not_blank
    command.__annotations__ = hints  # else they would be evaluated again, into other objects


def read_shard(shard: str | None, join: list[str] | None) -> Shard | None:
    """The shard that is meant by `--shard`.

    Raises:
        UserError: it is none, or there is `--join`, too.
    """
    if shard and join:
        raise UserError("--shard and --join: first run every shard, then join what they wrote")
    return Shard.parse(shard) if shard else None


def print_facts(facts: object) -> None:
    """The last line of a command: its result as JSON on standard output."""
    print(json.dumps(facts))
