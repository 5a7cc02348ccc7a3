"""A share of the work, for processes that never meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from softteacher.errors import UserError

T = TypeVar("T")


class Shard(NamedTuple):
    """One of `of` shards; `number` counts from 1.

    Example:
        >>> Shard.parse("2/3").share(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard as people write it: `2/8`.

        Raises:
            UserError: it isn't one.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"--shard {text}: write number/of, with numbers from 1, e.g. 2/8")
        return cls(int(number), int(of))

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `of`-th item from this shard's first."""
        return list(items[self.number - 1 :: self.of])
