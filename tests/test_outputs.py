"""Output folders and files: all or nothing, on any disk and on a real S3 store; what is finished is never lost."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.demo.servers import ObjectStore
from softteacher.errors import UserError
from tests.test_storage import names


def fail_half_way(file: Path) -> None:
    file.write_bytes(b"half")
    raise ZeroDivisionError


def test_output_folder_publishes_all_or_nothing(base: str) -> None:
    storage.write_bytes(f"{base}/out/old", b"old")
    storage.write_bytes(f"{base}/out/metrics.json", b"old")

    with pytest.raises(ZeroDivisionError), storage.output_folder(f"{base}/out") as folder:
        fail_half_way(folder / "metrics.json")
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
