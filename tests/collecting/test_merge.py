"""A round is never written over the split that it began with."""

import os
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.collecting.collect import collect, hash_shard, merge, plan
from softteacher.errors import UserError
from tests.arrivals import Place, picture


def written(folder: str) -> dict[str, bytes]:
    return {f.name: storage.read_bytes(storage.join(folder, f.name)) for f in storage.list_files(folder)}


@pytest.mark.parametrize("where", ["local", "place"])
def test_out_is_not_the_base(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place: Place = request.getfixturevalue(where)
    place.put("10.png", picture(10))
    before = written(place.base)
    made, hashes = str(tmp_path / "plan"), str(tmp_path / "hashes")
    plan(place.source, place.state, made, base=place.base)
    hash_shard(made, 0, hashes)
    ways = [f"{place.base}/"]
    if where == "local":
        (tmp_path / "link").symlink_to(place.base)
        ways += [str(tmp_path / "link"), os.path.relpath(place.base)]
    for out in ways:
        with pytest.raises(UserError, match=r"--out .*: is the --base"):
            merge(made, [hashes], out)
        with pytest.raises(UserError, match=r"--out .*: is the --base"):
            collect("/nowhere", place.state, out, base=place.base)  # told before anything is looked at
    assert written(place.base) == before
