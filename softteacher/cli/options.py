"""What commands of several modules share."""

from __future__ import annotations

import json
import math
from typing import Annotated

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
