"""Storage, the same cases on the local disk and on a real S3 store."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softteacher import s3 as s3_module
from softteacher import storage
from softteacher.demo.servers import ObjectStore
from softteacher.errors import UserError


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to work in."""
    return f"{request.getfixturevalue('s3')}/base" if request.param == "s3" else str(tmp_path / "base")


def names(uri: str | Path) -> list[str]:
    return [f.name for f in storage.list_files(uri)]


@pytest.mark.parametrize("last", ["provenance.json", "pending.json"])
def test_what_tells_that_a_folder_is_whole_comes_last(base: str, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed while the weights are on their way."""
    order: list[str] = []
    copy, replace = storage._copy_file, Path.replace
    monkeypatch.setattr(storage, "_copy_file", lambda a, b: order.append(Path(a).name) or copy(a, b))
    monkeypatch.setattr(Path, "replace", lambda a, b: order.append(a.name) or replace(a, b))
    with storage.output_folder(f"{base}/model") as folder:
        for name in (last, "classes.json", "teacher.pt"):
            (folder / name).write_text(name)
    assert [name for name in order if not name.startswith(".")] == ["classes.json", "teacher.pt", last]


@pytest.mark.parametrize("uri", ["gs://b/x", "s3:/b/x", "S3://b/x", "file:///x", "s3a://b/x", Path("s3://b/x")])
def test_a_uri_of_another_kind_makes_no_local_folder(uri: str | Path) -> None:
    for call in (storage.is_s3, storage.read_bytes, lambda uri: storage.output_folder(uri).__enter__()):
        with pytest.raises(UserError, match=r":/.*: only local paths and s3://bucket/key are supported"):
            call(uri)


@pytest.mark.parametrize("path", ["C:/x", "./gs:/x", "/gs:/x", "a b:/x", "12:/30", "gs:x"])
def test_a_path_may_have_a_colon(path: str) -> None:
    assert not storage.is_s3(path)


def test_what_takes_long_shows_progress(base: str, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a log it is a line at the end, in any case."""
    for name in ("a", "b", "c"):
        storage.write_bytes(f"{base}/{name}", b"x")
    storage.copy(f"{base}/a", f"{s3}/a")
    assert capsys.readouterr().err == ""
    with storage.local_input(base) as folder:
        assert ("] 3/3" in capsys.readouterr().err) is storage.is_s3(base)
        storage.copy(folder, f"{s3}/copied")
    assert capsys.readouterr().err.startswith("copy       [######")
    with storage.output_folder(f"{s3}/out") as folder:
        storage.write_bytes(folder / "a", b"x")
        storage.write_bytes(folder / "b" / "c", b"x")
    assert capsys.readouterr().err == f"upload     [{24 * '#'}] 2/2\n"


def test_round_trip(base: str) -> None:
    for uri, data in ((f"{base}/a b/ü.bin", bytes(range(256)) * 50_000), (f"{base}/empty", b"")):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
    storage.write_bytes(f"{base}/empty", b"again")
    assert storage.read_bytes(f"{base}/empty") == b"again"
    assert [file[:2] for file in storage.list_files(base)] == [("a b/ü.bin", 12_800_000), ("empty", 5)]


def test_missing(base: str) -> None:
    for call in (
        storage.read_bytes,
        lambda uri: storage.copy(uri, f"{base}/x"),
        lambda u: storage.local_input(u).__enter__(),
    ):
        with pytest.raises(storage.MissingFile, match="missing"):
            call(f"{base}/missing")
    assert storage.etag(f"{base}/missing") == ""
    assert not storage.exists(f"{base}/missing")
    storage.remove(f"{base}/missing")


def test_exists_takes_no_other_name_for_it(base: str) -> None:
    for name in ("run-1/a", "run/b/c", "run.json"):
        storage.write_bytes(f"{base}/{name}", b"x")
    for name in ("run", "run/", "run/b", "run/b/c", "run.json", ""):
        assert storage.exists(f"{base}/{name}"), name
    for name in ("ru", "run/c", "run.jso", "run/b/c/d"):
        assert not storage.exists(f"{base}/{name}"), name


def test_a_listing_tells_other_content_by_its_etag(base: str) -> None:
    storage.write_bytes(f"{base}/x", b"one")
    (first,) = storage.list_files(base)
    assert list(storage.list_files(base)) == [first]
    storage.write_bytes(f"{base}/x", b"two")
    (second,) = storage.list_files(base)
    assert first.etag
    assert second.etag not in ("", first.etag)
    if storage.is_s3(base):
        assert second.etag == storage.etag(f"{base}/x")


def test_list_files(base: str) -> None:
    for name in ("z", "b/1", "b/10", "b/2", "b-x/1", "a/deep/er"):
        storage.write_bytes(f"{base}/{name}", name.encode())
    assert sorted(names(base)) == ["a/deep/er", "b-x/1", "b/1", "b/10", "b/2", "z"]
    assert names(f"{base}/b") == ["1", "10", "2"]
    assert names(f"{base}/b/") == ["1", "10", "2"]
    assert names(f"{base}/nothing") == []


@pytest.mark.parametrize("key", ["model/../../evil", "model/a/../b", "model//etc/evil", "model/.."])
def test_no_object_is_written_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Whoever may write to a bucket may not write to the disks of those who read it."""
    monkeypatch.setattr(s3_module, "objects", lambda *_, **__: iter([("model/good", 1, ""), (key, 1, "")]))
    monkeypatch.setattr(s3_module, "download", lambda uri, target: target.write_bytes(b"x"))
    with pytest.raises(UserError, match=r"the object '.*' can't be a file below a folder; remove it"):
        storage.copy("s3://bucket/model", tmp_path / "deep" / "model")
    assert not list(tmp_path.rglob("evil"))


def test_a_listing_leaves_out_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def replace(self: Path, target: Path) -> None:
        seen.append((self.exists(), names(tmp_path)))

    monkeypatch.setattr(Path, "replace", replace)
    storage.write_bytes(tmp_path / "a", b"whole")
    assert seen == [(True, [])]


def test_copy_in_all_directions(base: str, s3: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{base}/from/a", b"1")
    storage.write_bytes(f"{base}/from/b/c", b"2" * 9_000_000)
    for target in (f"{s3}/copy", str(tmp_path / "copy")):
        storage.copy(f"{base}/from", target)
        assert names(target) == ["a", "b/c"]
        storage.copy(f"{target}/b/c", f"{base}/one/file")
        assert storage.read_bytes(f"{base}/one/file") == b"2" * 9_000_000


def test_remove(base: str) -> None:
    for name in ("d/a", "d/b/c", "d-other", "file"):
        storage.write_bytes(f"{base}/{name}", b"x")
    storage.remove(f"{base}/d")
    assert sorted(names(base)) == ["d-other", "file"]
    storage.remove(f"{base}/file")
    assert names(base) == ["d-other"]
    storage.remove(base)
    assert not storage.exists(base)


def test_remove_a_whole_bucket_s_files(s3: str) -> None:
    storage.write_bytes(f"{s3}/a/b", b"x")
    storage.remove(s3)
    assert names(s3) == []


def test_local_input(base: str) -> None:
    storage.write_bytes(f"{base}/in/a", b"1")
    storage.write_bytes(f"{base}/in/b/c", b"2")
    with storage.local_input(f"{base}/in") as folder:
        assert (folder / "b" / "c").read_bytes() == b"2"
    with storage.local_input(f"{base}/in/a") as file:
        assert (file.name, file.read_bytes()) == ("a", b"1")
    assert folder.exists() is not base.startswith("s3://")
    assert storage.read_bytes(f"{base}/in/a") == b"1"


def test_output_folder_publishes_all_or_nothing(base: str) -> None:
    storage.write_bytes(f"{base}/out/old", b"old")
    storage.write_bytes(f"{base}/out/metrics.json", b"old")

    def fail_half_way(folder: Path) -> None:
        (folder / "metrics.json").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), storage.output_folder(f"{base}/out") as folder:
        fail_half_way(folder)
    assert not folder.exists()
    assert storage.read_bytes(f"{base}/out/metrics.json") == b"old"
    with storage.output_folder(f"{base}/out") as folder:
        (folder / "metrics.json").write_bytes(b"new")
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_bytes(b"x")
        assert storage.read_bytes(f"{base}/out/metrics.json") == b"old"
    assert not folder.exists()
    assert sorted(names(f"{base}/out")) == ["metrics.json", "old", "sub/x"]
    assert storage.read_bytes(f"{base}/out/metrics.json") == b"new"


def test_output_folder_in_a_file_s_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="is a file, but a folder"), storage.output_folder(tmp_path / "out"):
        pass
    assert names(str(tmp_path)) == ["out"]


def test_conditional_write(s3: str) -> None:
    uri = f"{s3}/pointer.json"
    storage.write_bytes(uri, b"1", if_match="")
    with pytest.raises(storage.Conflict, match="somebody else wrote it"):
        storage.write_bytes(uri, b"2", if_match="")
    etag = storage.etag(uri)
    storage.write_bytes(uri, b"3", if_match=etag)
    with pytest.raises(storage.Conflict):
        storage.write_bytes(uri, b"4", if_match=etag)
    assert storage.read_bytes(uri) == b"3"


def test_one_of_many_conditional_writes_wins(s3: str) -> None:
    won = []

    def write(i: int) -> None:
        try:
            storage.write_bytes(f"{s3}/claim", str(i).encode(), if_match="")
            won.append(i)
        except storage.Conflict:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(f"{s3}/claim") == str(won[0]).encode()


def test_what_the_user_is_told_about_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(storage.MissingFile, match="s3://no-such-bucket-here/a: no such bucket"):
        storage.read_bytes("s3://no-such-bucket-here/a")
    with pytest.raises(UserError, match="no such bucket"):
        list(storage.list_files("s3://no-such-bucket-here/a"))
    with pytest.raises(UserError, match="no bucket in the S3 URI; write s3://bucket/key"):
        storage.read_bytes("s3:///a")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(UserError, match=rf"{s3}/a: S3 refused access \(SignatureDoesNotMatch\)"):
            storage.read_bytes(f"{s3}/a")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(UserError, match=r"S3 refused access \(InvalidAccessKeyId\)"):
            list(storage.list_files(s3))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"S3 at http://127\.0\.0\.1:9 can't be reached; check AWS_ENDPOINT_URL_S3"):
            storage.exists(f"{s3}/a")
    assert not storage.exists(f"{s3}/a")


def test_what_the_user_is_told_about_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file where a folder is needed"):
        storage.write_bytes(tmp_path / "file" / "below", b"x")
    with pytest.raises(UserError, match="not a directory; check the path"):
        storage.read_bytes(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="is a directory; check the path"):
        storage.read_bytes(tmp_path)
    assert names(str(tmp_path)) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"x" * 100_000)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        storage.copy(tmp_path / "from", "/dev/full")


def kept(error: pytest.ExceptionInfo[UserError]) -> Path:
    return Path(str(error.value).rsplit(" ", 1)[1])


def test_a_result_that_cannot_be_published_is_kept(tmp_path):
    def work() -> None:
        with storage.output_folder(tmp_path / "out") as folder:
            (folder / "weights").write_text("hours of work")
            (tmp_path / "out").write_text("somebody else's file")

    with pytest.raises(UserError, match="is kept in") as error:
        work()
    assert (kept(error) / "weights").read_text() == "hours of work"


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm to be another file system than that of temporary files")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize("there", [True, False])
def test_output_folder_by_a_link_to_another_disk(tmp_path: Path, other_disk: Path, there: bool) -> None:
    (tmp_path / "link").symlink_to(other_disk / "out")
    if there:
        (other_disk / "out").mkdir()
        (other_disk / "out" / "old").write_text("old")
    with storage.output_folder(tmp_path / "link") as folder:
        (folder / "weights").write_text("new")
        assert names(tmp_path / "link") == ["old"] * there  # whoever lists the folder sees nothing of what is made
    assert names(other_disk / "out") == ["old"] * there + ["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert [path.name for path in other_disk.iterdir()] == ["out"]


def test_a_result_is_kept_whatever_goes_wrong(tmp_path: Path, other_disk: Path) -> None:
    """A file can't be moved to another disk, and the system's error for that is none of those we know."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(other_disk)

    def work() -> None:
        with storage.output_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "weights").write_text("hours of work")

    with pytest.raises(UserError, match=r"out: OSError: .*; the finished result is kept in") as error:
        work()
    assert (kept(error) / "sub" / "weights").read_text() == "hours of work"


def test_a_result_is_kept_when_its_publishing_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with storage.output_folder(tmp_path / "out") as folder:
            (folder / "weights").write_text("hours of work")
            monkeypatch.setattr(Path, "replace", interrupt)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    said = capsys.readouterr().err
    assert said.startswith("the finished result is kept in ")
    assert Path(said.split()[-1], "weights").read_text() == "hours of work"


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder of everybody's for a user who may not write everywhere, as root may."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = os.getuid() == 0
        closed, opened = Path(folder, "closed"), Path(folder, "closed", "open")
        opened.mkdir(parents=True)
        opened.chmod(0o777)
        closed.chmod(0o555)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield closed
        finally:
            if root:
                os.setresuid(0, 0, 0)
            closed.chmod(0o755)


def test_a_volume_needs_no_writable_folder_around_it() -> None:
    with ordinary_user() as closed:
        with storage.output_folder(closed / "open") as folder:
            (folder / "weights").write_text("new")
        assert names(closed / "open") == ["weights"]
        for target in (closed, closed / "new", closed / "new" / "deep"):
            with pytest.raises(UserError, match=rf"{target}: {closed} is not writable"):
                storage.output_folder(target).__enter__()
        with pytest.raises(UserError, match=rf"{closed}/file: {closed} is not writable"):
            storage.output_file(closed / "file").__enter__()


def test_output_file(base: str) -> None:
    storage.write_bytes(f"{base}/found.json", b"old")

    def fail_half_way(file: Path) -> None:
        file.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), storage.output_file(f"{base}/found.json") as file:
        fail_half_way(file)
    assert not file.exists()
    assert storage.read_bytes(f"{base}/found.json") == b"old"
    with storage.output_file(f"{base}/found.json") as file:
        file.write_bytes(b"new")
    assert not file.exists()
    assert storage.read_bytes(f"{base}/found.json") == b"new"


def test_output_file_is_refused_before_the_work(tmp_path: Path, object_store: ObjectStore) -> None:
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path, "is a folder, but a file is needed"),
        (tmp_path / "file" / "deep" / "found.json", "file: is a file where a folder is needed"),
        ("s3://no-such-bucket-here/found.json", "no such bucket"),
    ):
        with pytest.raises(UserError, match=message):
            storage.output_file(target).__enter__()


def test_an_output_file_that_cannot_be_copied_is_kept(tmp_path: Path) -> None:
    def work() -> None:
        with storage.output_file(tmp_path / "found.json") as file:
            file.write_text("hours of work")
            (tmp_path / "found.json").mkdir()

    with pytest.raises(UserError, match="is kept in") as error:
        work()
    assert kept(error).read_text() == "hours of work"
