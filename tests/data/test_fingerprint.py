"""The fingerprint of a data set changes with what `split` makes of it, and with nothing else."""

from pathlib import Path

import pytest

from softteacher import storage
from softteacher.data.fingerprint import fingerprint
from softteacher.errors import UserError


@pytest.fixture(params=["disk", "s3"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path / "data") if request.param == "disk" else f"{request.getfixturevalue('s3')}/data"
    storage.write_bytes(f"{root}/annotations/instances_train.json", b"{}")
    storage.write_bytes(f"{root}/images/a.jpg", b"123")
    return root


def test_it_changes_with_the_listing_and_the_labels(data: str):
    seen = {fingerprint(data)}
    assert seen == {fingerprint(data + "/")}
    for name, content in (
        ("annotations/instances_train.json", b"[]"),  # as long as before
        ("images/b.jpg", b"123"),
        ("images/a.jpg", b"1234"),
        ("annotations/instances_val.json", b"{}"),
    ):
        storage.write_bytes(f"{data}/{name}", content)
        seen.add(fingerprint(data))
    assert len(seen) == 5
    assert fingerprint(f"{data}/annotations/instances_train.json") not in seen
    assert fingerprint(data, f"{data}/images") not in seen


def test_images_behind_a_link_count(tmp_path: Path):
    """And a link that leads back up doesn't lead round in circles."""
    storage.write_bytes(tmp_path / "disk" / "a.jpg", b"123")
    storage.write_bytes(tmp_path / "data" / "annotations" / "instances_train.json", b"{}")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "disk")
    found = [f.name for f in storage.list_files(tmp_path / "data", follow=True)]
    assert [name for name in found if name.endswith(".jpg")] == ["a/a.jpg", "images/a.jpg"]
    before = fingerprint(str(tmp_path / "data"))
    storage.write_bytes(tmp_path / "disk" / "b.jpg", b"123")
    assert fingerprint(str(tmp_path / "data")) != before


@pytest.mark.parametrize("name", ["nothing", "nothing.json"])
def test_there_is_nothing(data: str, name: str):
    with pytest.raises(UserError, match="nothing"):
        fingerprint(f"{data}/{name}")
    with pytest.raises(UserError, match="nothing"):
        fingerprint(data, f"{data}/{name}")
