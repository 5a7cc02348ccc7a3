"""Storage, the same cases on the local disk and on a real S3 store."""

import threading
from pathlib import Path

import pytest

from softteacher import s3 as s3_module
from softteacher import storage
from softteacher.errors import UserError


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
    """In a log it is a line at the end; of a few files there is none."""
    for n in range(storage.FEW + 1):
        storage.write_bytes(f"{base}/{n}", b"x")
    storage.copy(f"{base}/0", f"{s3}/a")
    assert capsys.readouterr().err == ""
    with storage.local_input(base) as folder:
        assert ("] 17/17" in capsys.readouterr().err) is storage.is_s3(base)
        storage.copy(folder, f"{s3}/copied")
    assert capsys.readouterr().err.startswith("copy       [######")
    for count, said in ((17, f"upload     [{24 * '#'}] 17/17\n"), (16, "")):
        with storage.output_folder(f"{s3}/out") as folder:
            for n in range(count):
                storage.write_bytes(folder / f"{n % 2}" / f"{n}", b"x")
        assert capsys.readouterr().err == said


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
