"""The cache of S3 images: bounded, shared, never wrong, and never in the way."""

import contextlib
import errno
import multiprocessing
import os
import sqlite3
from pathlib import Path

import diskcache
import pytest

from softteacher import storage
from softteacher.config import load_settings
from softteacher.data import cache as module
from softteacher.data.cache import ImageCache, cache_folder
from softteacher.data.loader import batches
from softteacher.errors import UserError
from tests.faulty import FaultyProxy
from tests.samples import TINY, coco_tree, dataset, write_coco


@pytest.fixture
def store(s3, monkeypatch):
    """A proxy in front of the store, which counts the requests."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy


def files(folder):
    return list(Path(folder).rglob("*.val"))


def read_all(arguments):
    folder, uris = arguments
    cache = ImageCache(1, folder)
    return [len(cache.read(uri)) for uri in uris * 2]


def test_an_image_is_fetched_once_and_compared_once_a_run(store, s3, tmp_path):
    uri = f"{s3}/a.jpg"
    storage.write_bytes(uri, b"first")
    run = ImageCache(10, str(tmp_path))
    store.seen.clear()
    assert [run.read(uri) for _ in range(3)] == [b"first"] * 3
    assert len(store.seen) == 1
    storage.write_bytes(uri, b"second")
    assert run.read(uri) == b"first"  # a run goes on with what it began with
    run = ImageCache(10, str(tmp_path))
    store.seen.clear()
    assert [run.read(uri) for _ in range(3)] == [b"second"] * 3
    assert len(store.seen) == 1
    storage.remove(uri)
    with pytest.raises(storage.MissingFile):
        ImageCache(10, str(tmp_path)).read(uri)


def test_after_a_restart_the_store_sends_no_body(store, s3, tmp_path, monkeypatch):
    storage.write_bytes(f"{s3}/a.jpg", b"x" * 50_000)
    ImageCache(10, str(tmp_path)).read(f"{s3}/a.jpg")
    sent = []
    monkeypatch.setattr(storage, "read_unless", lambda *a, f=storage.read_unless: sent.append(f(*a)) or sent[-1])
    assert ImageCache(10, str(tmp_path)).read(f"{s3}/a.jpg") == b"x" * 50_000
    assert [data for data, _ in sent] == [None]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5] + b"!" + b[6:], lambda b: b""])
def test_a_torn_file_is_never_served(s3, tmp_path, damage):
    storage.write_bytes(f"{s3}/a.jpg", b"x" * 50_000)
    ImageCache(10, str(tmp_path)).read(f"{s3}/a.jpg")
    (file,) = files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert ImageCache(10, str(tmp_path)).read(f"{s3}/a.jpg") == b"x" * 50_000
    file.unlink(missing_ok=True)
    assert ImageCache(10, str(tmp_path)).read(f"{s3}/a.jpg") == b"x" * 50_000


def test_it_is_bounded_and_the_least_recently_used_go(s3, tmp_path):
    uris = [f"{s3}/{n}.jpg" for n in range(60)]
    for uri in uris:
        storage.write_bytes(uri, b"x" * 100_000)
    cache = ImageCache(4, str(tmp_path))
    for uri in uris:
        cache.read(uri)
        cache.read(uris[0])
    assert 1_000_000 < sum(f.stat().st_size for f in files(tmp_path)) < 4 * 2**20
    with diskcache.FanoutCache(tmp_path) as found:
        assert uris[0] in found
        assert uris[-1] in found
        assert uris[1] not in found
    ImageCache(2, str(tmp_path)).read(uris[0])  # a smaller one makes room at once
    assert sum(f.stat().st_size for f in files(tmp_path)) < 2 * 2**20


def test_many_processes_share_it(object_store, s3, tmp_path):
    uris = [f"{s3}/{n}.jpg" for n in range(30)]
    for n, uri in enumerate(uris):
        storage.write_bytes(uri, b"x" * (50_000 + n))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(read_all, [(str(tmp_path), uris)] * 4, chunksize=1)
    assert found == [[50_000 + n for n in range(30)] * 2] * 4
    assert sum(f.stat().st_size for f in files(tmp_path)) < 2**20 + 8 * 4 * 50_030


def test_a_full_disk(s3, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    images = [name * 50_000 for name in (b"a", b"b")]
    for name, image in zip("ab", images, strict=True):
        storage.write_bytes(f"{s3}/{name}", image)
    cache = ImageCache(10, str(tmp_path))
    cache.read(f"{s3}/a")
    monkeypatch.setattr(diskcache.Disk, "_write", full)
    for _ in range(2):
        assert [cache.read(f"{s3}/{name}") for name in "ab"] == images
    assert capsys.readouterr().err.splitlines() == [
        "image cache: [Errno 28] No space left on device; no further images are kept"
    ]


def test_a_lock_that_is_not_to_be_had(s3, tmp_path):
    storage.write_bytes(f"{s3}/a", b"a")
    cache = ImageCache(10, str(tmp_path))
    cache.read(f"{s3}/a")
    with contextlib.ExitStack() as stack:
        for file in tmp_path.rglob("cache.db"):
            other = stack.enter_context(contextlib.closing(sqlite3.connect(file, isolation_level=None)))
            other.execute("BEGIN IMMEDIATE")
        assert cache.read(f"{s3}/a") == b"a"


def test_a_broken_data_base(s3, tmp_path, capsys):
    storage.write_bytes(f"{s3}/a", b"a")
    ImageCache(10, str(tmp_path)).read(f"{s3}/a")
    for file in tmp_path.rglob("cache.db*"):
        file.write_bytes(b"no data base" * 1000)
    cache = ImageCache(10, str(tmp_path))
    assert [cache.read(f"{s3}/a") for _ in range(3)] == [b"a"] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image cache: file is not a database")


def test_nothing_is_unpickled(s3, tmp_path):
    storage.write_bytes(f"{s3}/a", b"a")
    with diskcache.FanoutCache(tmp_path) as theirs:
        theirs.set(f"{s3}/a", _Trap(), tag="x")
    assert ImageCache(10, str(tmp_path)).read(f"{s3}/a") == b"a"
    assert not _Trap.sprung


class _Trap:
    sprung = False

    def __reduce__(self):
        return (_spring, ())


def _spring():
    _Trap.sprung = True


def test_local_files_and_no_cache(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda _: pytest.fail("opened"))
    (tmp_path / "a").write_bytes(b"a")
    storage.write_bytes(f"{s3}/a", b"a")
    assert ImageCache(10).read(str(tmp_path / "a")) == b"a"
    assert ImageCache(0).read(f"{s3}/a") == b"a"


def test_the_folder(tmp_path, monkeypatch, capsys, s3):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/softteacher/images"
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert cache_folder(str(tmp_path / "named")) == tmp_path / "named"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    assert cache_folder() == tmp_path / f"temp/softteacher-{os.getuid()}/softteacher/images"
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file: no folder that can be written to"):
        cache_folder(str(tmp_path / "file"))
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    storage.write_bytes(f"{s3}/a", b"a")
    assert ImageCache(10).read(f"{s3}/a") == b"a"
    assert "no folder can be written to (set data.cache_dir); going on without it" in capsys.readouterr().err


def test_the_loader_uses_it(store, s3, tmp_path):
    folder = write_coco(tmp_path / "set", coco_tree(4))
    storage.copy(folder, f"{s3}/set")
    data = dataset(folder)
    data.root = f"{s3}/set/images"
    settings = load_settings(None, [*TINY, f"data.cache_dir={tmp_path / 'cache'}"])
    store.seen.clear()
    list(batches(data, None, settings, 0))
    assert len(store.seen) == 4  # of 12 images that 6 steps take
