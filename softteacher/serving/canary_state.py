"""A canary: a version that Triton serves as `{name}-canary` and that clients send a share of their requests to.

{repository}/{name}-canary/config.pbtxt   with the parameter `canary`, by which clients learn of it
                           canary.json    written last; without it there is no canary
                           {version}/     as under {name}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from softteacher import storage
from softteacher.errors import UserError


@dataclass(frozen=True)
class Canary:
    """A version on trial.

    Attributes:
        version: which the promotion will make live.
        share: of the requests, 0 to 1, that clients send to it.
    """

    version: int
    share: float

    def parameter(self) -> bytes:
        """The line of `config.pbtxt` that tells clients."""
        value = json.dumps(json.dumps({"share": self.share, "version": self.version}))
        return f'parameters {{ key: "canary" value {{ string_value: {value} }} }}\n'.encode()


def refuse_beside(canary: Canary | None, name: str, then: str) -> None:
    """Refuse what can't be done while a canary is on trial.

    Args:
        canary: of the model, if any.
        name: of the model.
        then: what to do when the trial is over.

    Raises:
        UserError: there is one.
    """
    if canary:
        raise UserError(
            f"{name}: version {canary.version} is a canary; `softteacher promote` makes it live, `softteacher rollback`"
            f" ends it, then {then}"
        )


def canary_folder(repository: str, name: str, *below: str) -> str:
    """Where the canary of a model is."""
    return storage.join(repository, f"{name}-canary", *below)


def read_canary(repository: str, name: str) -> Canary | None:
    """The canary of a model; none if there is none.

    Raises:
        UserError: `canary.json` can't be read, or is torn.
    """
    uri = canary_folder(repository, name, "canary.json")
    try:
        return Canary(**json.loads(storage.read_bytes(uri)))
    except storage.MissingFile:
        return None
    except (TypeError, ValueError):
        raise UserError(f"{uri}: torn, or not ours; remove it, there is no canary then") from None


def write_canary(repository: str, name: str, canary: Canary) -> None:
    """Set the canary of a model that has none.

    Raises:
        Conflict: somebody else did meanwhile (on S3).
    """
    data = json.dumps(asdict(canary)).encode()
    storage.write_bytes(canary_folder(repository, name, "canary.json"), data, if_match="")


def parse_share(text: str) -> float:
    """A share of the requests, as people write it: `10%` or `0.1`.

    Raises:
        UserError: it isn't one.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--canary {text}: is no share of the requests; write 10% or 0.1")
    return share
