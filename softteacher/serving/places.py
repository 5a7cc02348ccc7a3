"""Where models may lie, and the records of them."""

from __future__ import annotations

from pathlib import Path

from softteacher import storage
from softteacher.errors import UserError


def check_repository(repository: str) -> None:
    """Whether there is a model repository, or one can begin there: the bucket, or the folder around it, must exist.

    Raises:
        UserError: there is none, and none can begin, or it can't be read.
    """
    if storage.is_s3(repository):
        storage.exists(repository)  # raises where there is no such bucket
        return
    path = Path(repository).absolute()
    if not path.is_dir() and (path.exists() or not path.parent.is_dir()):
        raise storage.MissingFile(f"{repository}: no such folder, nor one around it; check --repository")


def check_registry(registry: str, repository: str) -> None:
    """Whether records of models can be kept there.

    Raises:
        UserError: it is in Triton's repository.
    """
    if registry and f"{storage.place(registry)}/".startswith(f"{storage.place(repository)}/"):
        raise UserError(
            f"--registry {registry}: is in Triton's repository, where only Triton's models are; choose another"
        )
