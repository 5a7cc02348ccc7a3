"""Local paths and `s3://` URIs behind one small interface.

The endpoint and credentials come from the usual AWS variables (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, ...).
Every failure that a user can mend is a `UserError` of one line.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from softteacher import s3
from softteacher.console import say, track
from softteacher.errors import Conflict as Conflict
from softteacher.errors import MissingFile, UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one letter would be a drive of Windows
_LAST = {"provenance.json", "pending.json"}  # they tell that the files beside them are whole
FEW = 16  # files that are copied without a word
_PART = ".part"  # end of the name of a file that is being written
_SCRATCH = ".softteacher-"  # begin of the name of a folder that is being written


class FileInfo(NamedTuple):
    """A file below a folder or prefix.

    Attributes:
        name: its path relative to the folder or prefix, with `/`.
        size: in bytes.
        etag: another one when the content is another: of S3, or made of time and size of a local file.
    """

    name: str
    size: int
    etag: str = ""


def is_s3(uri: str | Path) -> bool:
    """Whether `uri` is an `s3://bucket/key` URI; else it is a local path.

    Raises:
        UserError: it is a URI of another kind, or one with a typo, which would make an odd local folder.
    """
    text = str(uri)
    if text.startswith("s3://"):
        return True
    if _SCHEME.match(text):
        raise UserError(f"{text}: only local paths and s3://bucket/key are supported; write one of them")
    return False


def place(uri: str | Path) -> str:
    """The one spelling of a place: a path without links, a URI without a slash at its end."""
    return str(uri).rstrip("/") if is_s3(uri) else os.path.realpath(uri)


def join(base: str | Path, *parts: str) -> str:
    """`base/part/...` for a local path or an S3 URI."""
    return "/".join([str(base).rstrip("/"), *parts])


def leads_out(name: str) -> bool:
    """Whether the relative name of a file would lead out of the folder that it is joined to."""
    return name.startswith("/") or (".." in name and ".." in name.split("/"))


def read_bytes(uri: str | Path) -> bytes:
    """The content of one file.

    Raises:
        MissingFile: there is none (a `UserError`).
        UserError: it can't be read.
    """
    with _explained(uri):
        if is_s3(uri):
            return s3.get(uri)[0] or b""
        return Path(uri).read_bytes()


def read_unless(uri: str | Path, etag: str) -> tuple[bytes | None, str]:
    """The content of an S3 object and its etag; none for the content where it still has the given etag.

    Raises:
        MissingFile: there is none.
        UserError: it can't be read.
    """
    return s3.get(uri, unless=etag)


def write_bytes(uri: str | Path, data: bytes | memoryview, *, if_match: str | None = None) -> None:
    """Write one file whole or not at all.

    Args:
        uri: where.
        data: what.
        if_match: on S3 only: an etag that the present object must still have, or `""` if there must be none.

    Raises:
        Conflict: somebody else wrote it meanwhile.
        UserError: it can't be written.
    """
    with _explained(uri):
        if is_s3(uri):
            s3.put(uri, data, if_match)
            return
        with _whole(uri) as part:
            part.write_bytes(data)


def etag(uri: str | Path) -> str:
    """The etag of an S3 object for `write_bytes(if_match=...)`; `""` if there is none, or for a local path."""
    if not is_s3(uri):
        return ""
    try:
        return s3.etag(uri)
    except MissingFile:
        return ""


def exists(uri: str | Path) -> bool:
    """Whether there is a file, or a folder (prefix) with files, at `uri`."""
    with _explained(uri):
        if not is_s3(uri):
            return Path(uri).exists()
        key = s3.split(uri)[1].rstrip("/")
        for prefix in (key, key + "/") if key else ("",):
            if any(k == key or k.startswith(prefix and key + "/") for k, *_ in s3.objects(uri, prefix, limit=1)):
                return True
        return False


def list_files(uri: str | Path, *, follow: bool = False) -> Iterator[FileInfo]:
    """Every file below a folder or prefix, sorted by name; nothing if there is none, and not what is being written.

    Args:
        uri: of the folder or prefix.
        follow: look into folders that are links, too, but not into one that leads back to where it lies.

    Raises:
        UserError: the bucket or folder can't be read.
    """
    if is_s3(uri):
        key = s3.split(uri)[1]
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        for name, size, tag in s3.objects(uri, prefix):
            if not name.endswith("/"):
                yield FileInfo(name[len(prefix) :], size, tag)
        return
    root = str(Path(uri))
    if not Path(root).exists():
        return
    with _explained(uri):
        found: list[FileInfo] = []
        way: dict[str, tuple[str, ...]] = {}  # the real folders that lead to one
        for folder, below_it, names in os.walk(root, onerror=_raise, followlinks=follow):
            if follow:
                real, above = os.path.realpath(folder), way.get(folder.rpartition("/")[0], ())
                if real in above:
                    below_it.clear()
                    continue
                way[folder] = (*above, real)
            below_it[:] = [name for name in below_it if not name.startswith(_SCRATCH)]
            below = Path(os.path.relpath(folder, root)).as_posix() + "/" if folder != root else ""
            for name in names:  # texts, not paths: there may be millions
                if name.endswith(_PART) and name.startswith("."):
                    continue
                try:
                    stat = os.stat(f"{folder}/{name}")  # noqa: PTH116
                    size, tag = stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
                except OSError:  # a dangling link; whoever reads it reports it as an unreadable image
                    size, tag = 0, ""
                found.append(FileInfo(below + name, size, tag))
    yield from sorted(found)


def copy(source: str | Path, target: str | Path) -> None:
    """Copy one file, or every file below a folder or prefix, between local disk and S3 in any direction.

    Raises:
        MissingFile: there is nothing.
        UserError: it can't be read or written, or the name of an object would lead out of a local folder.
    """
    if not is_s3(source) and Path(source).is_file():
        return _copy_file(source, target)
    names = [f.name for f in list_files(source)]
    if not names and exists(source):
        return _copy_file(source, target)
    if not names:
        raise MissingFile(f"{source}: no such file or folder; check the path")
    if not is_s3(target) and (odd := next(filter(leads_out, names), None)):
        raise UserError(f"{source}: the object {odd!r} can't be a file below a folder; remove it, or rename it")
    for name in _shown(names, "copy"):
        _copy_file(join(source, name), join(target, name))


def remove(uri: str | Path) -> None:
    """Remove one file, or a folder or prefix with everything below it; nothing happens if there is none."""
    with _explained(uri):
        if not is_s3(uri):
            path = Path(uri)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        for name in [f.name for f in list_files(uri)]:
            s3.delete(join(uri, name))
        if s3.split(uri)[1]:
            s3.delete(uri)


@contextmanager
def local_input(uri: str | Path) -> Iterator[Path]:
    """A local path with the content of a file or folder: the path itself, or a temporary download from S3.

    Raises:
        UserError: there is nothing at `uri`.
    """
    if not is_s3(uri):
        if not Path(uri).exists():
            raise MissingFile(f"{uri}: no such file or folder; check the path")
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="softteacher-") as folder:
        target = Path(folder, str(uri).rstrip("/").rsplit("/", 1)[-1])
        copy(uri, target)
        yield target


@contextmanager
def output_folder(uri: str | Path) -> Iterator[Path]:
    """A scratch folder whose files are published at `uri` when the block succeeds, and vanish when it fails.

    Where only the publishing fails, the folder is kept and the error names it: hours of work may be in it.

    No file is ever seen half-written at `uri`, and `provenance.json` or `pending.json`, by which a folder is known to
    be whole, comes last; files there that the block did not write stay as they are.

    Example:
        >>> with output_folder("s3://bucket/run-1") as folder:        # doctest: +SKIP
        ...     (folder / "metrics.json").write_text("{}")
    """
    parent = None
    with _explained(uri):
        if is_s3(uri):
            exists(uri)  # a store or bucket that isn't there is told before the work, not after it
        else:  # the scratch folder is on the target's file system, so that its files can be moved
            target = Path(os.path.realpath(uri))  # a link to a folder is followed
            if target.exists() and not target.is_dir():
                raise UserError(f"{uri}: is a file, but a folder is needed for the output; choose another --out")
            _check_writable(uri, target)
            parent = target if target.is_dir() else target.parent  # the first may be a volume of its own
            parent.mkdir(parents=True, exist_ok=True)
    with _scratch(uri, parent, "", lambda folder: _publish(folder, uri)) as folder:
        yield folder


@contextmanager
def output_file(uri: str | Path) -> Iterator[Path]:
    """A scratch file that is copied to `uri` when the block succeeds, and vanishes when it fails.

    Where only the copying fails, the file is kept and the error names it.

    Raises:
        UserError: `uri` can't be written; said before the block, if it can be known.
    """
    with _explained(uri):
        if is_s3(uri):
            exists(uri)
        elif Path(uri).is_dir():
            raise UserError(f"{uri}: is a folder, but a file is needed for the output; choose another name")
        elif Path(uri).is_file() or not Path(uri).exists():  # not a device or a pipe
            _check_writable(uri, Path(uri).absolute().parent)
    with _scratch(uri, None, "output", lambda file: _copy_file(file, uri)) as file:
        yield file


def _check_writable(uri: str | Path, folder: Path) -> None:
    """Refuse a folder that can't be written or made, before work begins whose result should go there."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file where a folder is needed; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{uri}: {there} is not writable; choose another place, or change its mode")


@contextmanager
def _scratch(uri: str | Path, parent: Path | None, name: str, publish: Callable[[Path], None]) -> Iterator[Path]:
    """What is published when the block succeeds, and vanishes when it fails; kept if only the publishing fails.

    Args:
        uri: where, for errors.
        parent: of the scratch folder; none: the system's for temporary files.
        name: of a file in the scratch folder; empty: the folder itself is it.
        publish: is called with it.
    """
    with _explained(uri):
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    try:
        with _explained(uri):
            yield scratch / name
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    kept = f"the finished result is kept in {scratch / name}"
    try:
        with _explained(uri):
            publish(scratch / name)
    except UserError as e:
        raise UserError(f"{e}; {kept}") from e
    except Exception as e:
        raise UserError(f"{uri}: {type(e).__name__}: {e}; {kept}") from e
    except BaseException:  # told to end
        say(kept)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _publish(folder: Path, uri: str | Path) -> None:
    names = sorted((f.name for f in list_files(folder)), key=lambda name: name in _LAST)
    if is_s3(uri):
        for name in _shown(names, "upload"):
            _copy_file(folder / name, join(uri, name))
        return
    root = os.path.realpath(uri)
    for name in names:
        target = Path(root, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(target)


def _shown(names: list[str], title: str) -> Iterable[str]:
    """The names; of more than a few with a progress bar, which in a log is a line."""
    return track(names, title, len(names)) if len(names) > FEW else names


def _copy_file(source: str | Path, target: str | Path) -> None:
    with _explained(target if is_s3(target) else source):
        if is_s3(source) and is_s3(target):
            s3.copy(source, target)
        elif is_s3(target):
            s3.upload(Path(source), target)
        else:
            with _whole(target) as part:
                if is_s3(source):
                    s3.download(source, part)
                else:
                    shutil.copyfile(source, part)


@contextmanager
def _whole(target: str | Path) -> Iterator[Path]:
    """A path to write to; what is there becomes `target` when the block succeeds, and vanishes when it fails."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path  # a device or a pipe must not be replaced by a file
        return
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _explained(uri: str | Path) -> Iterator[None]:
    """Turn the errors of the operating system into one line that says what to do."""
    try:
        yield
    except FileNotFoundError as e:
        raise MissingFile(f"{e.filename or uri}: no such file or folder; check the path") from e
    except PermissionError as e:
        raise UserError(f"{e.filename or uri}: permission denied; check owner and mode") from e
    except (IsADirectoryError, NotADirectoryError) as e:
        raise MissingFile(f"{e.filename or uri}: {(e.strerror or '').lower()}; check the path") from e
    except FileExistsError as e:
        raise UserError(f"{e.filename or uri}: is a file where a folder is needed; choose another place") from e
    except OSError as e:
        if e.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(f"{e.filename or uri}: the disk is full; free some space or choose another place") from e
        if e.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
            raise MissingFile(f"{e.filename or uri}: {(e.strerror or '').lower()}; check the path") from e
        if e.errno == errno.EROFS:
            raise UserError(f"{e.filename or uri}: the file system is read-only; choose another place") from e
        raise


def _raise(error: OSError) -> None:
    raise error
