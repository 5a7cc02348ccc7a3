"""`key=value` overrides of settings, as `--set` takes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from softteacher.errors import UserError

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: to YAML 1.1, 010 is 8, 10:00 is 600, and 1e-4 is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rows if tag not in _NUMBERS]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_FLOAT = r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan"
for _tag, _pattern in zip(_NUMBERS, (r"[-+]?[0-9][0-9_]*", _FLOAT), strict=True):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"({_pattern})\Z", re.IGNORECASE), list("-+.0123456789"))
_Loader.add_constructor(_NUMBERS[0], _decimal)


def read_overrides(overrides: Iterable[str], known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The values of overrides by group and key.

    Args:
        overrides: e.g. `training.iterations=1000`, `data.scale_jitter=[0.8, 1.2]`; values are YAML, or `none`.
        known: the settings that there are.

    Raises:
        UserError: no such setting (the nearest is named), or not YAML.
    """
    tree: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: write key=value, for example training.iterations=1000")
        if key not in known:
            raise UserError(f"--set {key}: no such setting{nearest(key, known)}")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):  # a date like 2001-13-45 is a ValueError
            raise UserError(f"--set {override}: the value can't be read; quote it as YAML") from None
        group, name = key.split(".")
        tree.setdefault(group, {})[name] = None if isinstance(value, str) and value.lower() == "none" else value
    return tree


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message about a word that is none of the known ones: which may be meant."""
    tail = [k for k in known if k.endswith("." + word) or f"_{word}_" in k]  # `--set iterations=5`, or a backbone alone
    close = tail or difflib.get_close_matches(word, known, n=1, cutoff=0 if "." in known[0] else 0.4)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
