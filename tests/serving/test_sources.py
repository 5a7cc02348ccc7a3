"""Which images are meant by files, folders, globs and prefixes."""

import io
from pathlib import Path

import pytest
from PIL import Image

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving.sources import find_sources

FILES = ("a/one.jpg", "a/sub/one.jpg", "a/sub/two.PNG", "a/notes.txt", "b/one.jpg", "b/[odd].png", "c/readme.md")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "uris", "names"),
    [
        (["a/one.jpg"], ["a/one.jpg"], ["one.jpg"]),
        (["a/notes.txt"], ["a/notes.txt"], ["notes.txt"]),  # named by hand: it will be looked at
        (["a"], ["a/one.jpg", "a/sub/one.jpg", "a/sub/two.PNG"], ["one.jpg", "sub/one.jpg", "sub/two.PNG"]),
        (["a/"], ["a/one.jpg", "a/sub/one.jpg", "a/sub/two.PNG"], ["one.jpg", "sub/one.jpg", "sub/two.PNG"]),
        (["b/one.jpg", "a/one.jpg"], ["b/one.jpg", "a/one.jpg"], ["b/one.jpg", "a/one.jpg"]),
        (["a/sub", "b"], ["a/sub/one.jpg", "a/sub/two.PNG", "b/[odd].png", "b/one.jpg"], None),
        (["*/one.jpg"], ["a/one.jpg", "b/one.jpg"], ["a/one.jpg", "b/one.jpg"]),
        (["**/*.PNG"], ["a/sub/two.PNG"], ["two.PNG"]),
        (["[ab]/*"], ["a/one.jpg", "b/[odd].png", "b/one.jpg", "a/sub/one.jpg", "a/sub/two.PNG"], None),
        (["b/[odd].png"], ["b/[odd].png"], ["[odd].png"]),  # a file, not a glob
        (["a/one.jpg", "a", "*/one.jpg"], ["a/one.jpg", "a/sub/one.jpg", "a/sub/two.PNG", "b/one.jpg"], None),
    ],
)
def test_local(tree: Path, inputs: list[str], uris: list[str], names: list[str] | None) -> None:
    found = find_sources(inputs)
    assert [s.uri for s in found] == uris
    assert [s.name for s in found] == (names or uris)
    absolute = find_sources(str(tree / item) for item in inputs)
    assert [s.uri for s in absolute] == [str(tree / uri) for uri in uris]
    assert [s.name for s in absolute] == [s.name for s in found]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg: no such file"),
        (["a", "no where"], "no where: no such file"),
        (["c"], r"c: no images in it \(.jpg"),
        (["*.jpg"], r"\*.jpg: no images in it"),
        ([], "no images to look at"),
    ],
)
def test_nothing_there(tree: Path, inputs: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sources(inputs)


def test_an_object_that_leads_out_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [storage.FileInfo(name, 1) for name in ("a.jpg", "b/../../c.jpg")]
    monkeypatch.setattr(storage, "list_files", lambda uri: iter(listed))
    with pytest.raises(UserError, match=r"s3://bucket/day: file_name 'b/\.\./\.\./c\.jpg' leaves the image folder"):
        find_sources(["s3://bucket/day"])


def test_s3(s3: str, tree: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    for name in ("day/1/x.png", "day/2/x.png", "day/2/list.csv", "blob"):
        storage.write_bytes(f"{s3}/{name}", file.getvalue())
    assert find_sources([f"{s3}/day"]) == find_sources([f"{s3}/day/"])
    assert find_sources([f"{s3}/day"]) == [(f"{s3}/day/{n}/x.png", f"{n}/x.png") for n in (1, 2)]
    assert find_sources([s3]) == [(f"{s3}/day/{n}/x.png", f"day/{n}/x.png") for n in (1, 2)]
    assert find_sources([f"{s3}/blob"]) == [(f"{s3}/blob", "blob")]
    assert find_sources([f"{s3}/day/1/x.png"]) == [(f"{s3}/day/1/x.png", "x.png")]
    both = find_sources([f"{s3}/day/1", "b/one.jpg"])
    assert [s.uri for s in both] == [f"{s3}/day/1/x.png", "b/one.jpg"]
    assert both[0].name.endswith(f"{s3.removeprefix('s3://')}/day/1/x.png")
    assert both[1].name.endswith("b/one.jpg")
    for uri in (f"{s3}/nothing", f"{s3}/day/2/list"):
        with pytest.raises(UserError, match="no images in it"):
            find_sources([uri])
    with pytest.raises(UserError, match="no such bucket"):
        find_sources(["s3://no-such-bucket-here/x"])
