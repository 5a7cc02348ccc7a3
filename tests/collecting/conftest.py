"""A place where images arrive, on S3 and on the local disk."""

from pathlib import Path

import pytest

from tests.arrivals import Place


@pytest.fixture
def place(s3: str, tmp_path: Path) -> Place:
    return Place(s3, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    """The same on the local disk, where S3 makes no difference."""
    return Place(str(tmp_path / "data"), tmp_path)
