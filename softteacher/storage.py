"""Local paths and `s3://` URIs behind one small interface.

The endpoint and credentials come from the usual AWS variables (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, ...).
Every failure that a user can mend is a `UserError` of one line.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from softteacher.errors import UserError

_local = threading.local()


class FileInfo(NamedTuple):
    """A file below a folder or prefix: its path relative to it, with `/`, and its size in bytes."""

    name: str
    size: int


def is_s3(uri: str | Path) -> bool:
    """Whether `uri` is an `s3://bucket/key` URI."""
    return str(uri).startswith("s3://")


def join(base: str | Path, *parts: str) -> str:
    """`base/part/...` for a local path or an S3 URI."""
    return "/".join([str(base).rstrip("/"), *parts])


def read_bytes(uri: str | Path) -> bytes:
    """The content of one file.

    Raises:
        MissingFile: there is none (a `UserError`).
        UserError: it can't be read.
    """
    with _explained(uri):
        if is_s3(uri):
            bucket, key = _split(uri)
            return bytes(_s3().get_object(Bucket=bucket, Key=key)["Body"].read())
        return Path(uri).read_bytes()


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
            bucket, key = _split(uri)
            condition = {} if if_match is None else {"IfMatch": if_match} if if_match else {"IfNoneMatch": "*"}
            _s3().put_object(Bucket=bucket, Key=key, Body=data, **condition)
            return
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def etag(uri: str | Path) -> str:
    """The etag of an S3 object for `write_bytes(if_match=...)`; `""` if there is none, or for a local path."""
    if not is_s3(uri):
        return ""
    try:
        with _explained(uri):
            bucket, key = _split(uri)
            return str(_s3().head_object(Bucket=bucket, Key=key)["ETag"])
    except MissingFile:
        return ""


def exists(uri: str | Path) -> bool:
    """Whether there is a file, or a folder (prefix) with files, at `uri`."""
    with _explained(uri):
        if not is_s3(uri):
            return Path(uri).exists()
        bucket, key = _split(uri)
        key = key.rstrip("/")
        for prefix in (key, key + "/") if key else ("",):
            page = _s3().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            if any(o["Key"] == key or o["Key"].startswith(prefix and key + "/") for o in page.get("Contents", [])):
                return True
        return False


def list_files(uri: str | Path) -> Iterator[FileInfo]:
    """Every file below a folder or prefix, sorted by name; nothing if there is none.

    Raises:
        UserError: the bucket or folder can't be read.
    """
    if is_s3(uri):
        with _explained(uri):
            bucket, key = _split(uri)
            prefix = key.rstrip("/") + "/" if key.strip("/") else ""
            for page in _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    if not entry["Key"].endswith("/"):
                        yield FileInfo(entry["Key"][len(prefix) :], entry["Size"])
        return
    root = Path(uri)
    if not root.exists():
        return
    with _explained(uri):
        found = []
        for folder, _, names in os.walk(root, onerror=_raise):
            for name in names:
                path = Path(folder, name)
                # a dangling link has no size; whoever reads it reports it as an unreadable image
                found.append(FileInfo(path.relative_to(root).as_posix(), path.stat().st_size if path.exists() else 0))
    yield from sorted(found)


def copy(source: str | Path, target: str | Path) -> None:
    """Copy one file, or every file below a folder or prefix, between local disk and S3 in any direction."""
    if not is_s3(source) and Path(source).is_file():
        return _copy_file(source, target)
    names = [f.name for f in list_files(source)]
    if not names and exists(source):
        return _copy_file(source, target)
    if not names:
        raise MissingFile(f"{source}: no such file or folder; check the path")
    for name in names:
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
        bucket, key = _split(uri)
        names = [f"{key.rstrip('/')}/{f.name}".lstrip("/") for f in list_files(uri)]
        for name in [key, *names] if key else names:
            _s3().delete_object(Bucket=bucket, Key=name)


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

    Nothing half-written is ever seen at `uri`; files there that the block did not write stay as they are.

    Example:
        >>> with output_folder("s3://bucket/run-1") as folder:        # doctest: +SKIP
        ...     (folder / "metrics.json").write_text("{}")
    """
    parent = None
    if is_s3(uri):
        exists(uri)  # a store or bucket that isn't there is told before the work, not after it
    else:
        with _explained(uri):
            parent = Path(uri).absolute().parent
            if Path(uri).exists() and not Path(uri).is_dir():
                raise UserError(f"{uri}: is a file, but a folder is needed for the output; choose another --out")
            parent.mkdir(parents=True, exist_ok=True)
            if not os.access(parent, os.W_OK):
                raise UserError(f"{uri}: {parent} is not writable; choose another --out, or change its mode")
    with _explained(uri):
        scratch = Path(tempfile.mkdtemp(prefix=".softteacher-", dir=parent))
    try:
        with _explained(uri):
            yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    try:
        if is_s3(uri):
            copy(scratch, uri)
        else:
            with _explained(uri):
                for info in list_files(scratch):
                    target = Path(uri, info.name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (scratch / info.name).replace(target)
    except UserError as e:
        raise UserError(f"{e}; the finished result is kept in {scratch}") from e
    shutil.rmtree(scratch, ignore_errors=True)


class MissingFile(UserError):
    """There is no file, folder, object or bucket at the path."""


class Conflict(UserError):
    """A conditional write found that somebody else had written."""


def _copy_file(source: str | Path, target: str | Path) -> None:
    with _explained(target if is_s3(target) else source):
        if is_s3(source) and is_s3(target):
            (bucket, key), (to_bucket, to_key) = _split(source), _split(target)
            _s3().copy({"Bucket": bucket, "Key": key}, to_bucket, to_key)
        elif is_s3(source):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            _s3().download_file(*_split(source), str(target))
        elif is_s3(target):
            with Path(source).open("rb") as file:  # upload_file would wrap what S3 says
                _s3().upload_fileobj(file, *_split(target))
        else:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _split(uri: str | Path) -> tuple[str, str]:
    bucket, _, key = str(uri)[len("s3://") :].partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket in the S3 URI; write s3://bucket/key")
    return bucket, key


def _s3() -> Any:
    """A client per thread, process (boto3 clients don't survive a fork) and setting of the AWS variables."""
    key = (os.getpid(), *sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    if getattr(_local, "key", None) != key:
        import boto3
        from botocore.config import Config

        # checksums only where asked for: stores behind old gateways refuse the newer default
        config = Config(
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=5,
            read_timeout=60,
            signature_version="s3v4",
            s3={"addressing_style": "path"} if _endpoint() else None,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        try:
            _local.client = boto3.Session().client("s3", config=config, region_name=region)
        except ValueError as e:
            raise UserError(f"AWS_ENDPOINT_URL_S3={_endpoint()}: {e}; write http://host:port") from None
        _local.key = key
    return _local.client


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@contextmanager
def _explained(uri: str | Path) -> Iterator[None]:
    """Turn the errors of the operating system and of S3 into one line that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, NoCredentialsError

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
    except NoCredentialsError as e:
        raise UserError(f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from e
    except (ConnectionError, HTTPClientError) as e:
        where = _endpoint() or "AWS"
        raise UserError(f"{uri}: S3 at {where} can't be reached; check AWS_ENDPOINT_URL_S3 and the network") from e
    except ClientError as e:
        code = str(e.response.get("Error", {}).get("Code", "?"))
        if code in {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}:
            what = "no such bucket" if code == "NoSuchBucket" else "no such object"
            raise MissingFile(f"{uri}: {what}; check the URI") from e
        if code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"}:
            raise UserError(f"{uri}: S3 refused access ({code}); check the credentials and the bucket's policy") from e
        if code in {"412", "PreconditionFailed", "ConditionalRequestConflict"}:
            raise Conflict(f"{uri}: somebody else wrote it meanwhile; look at it and try again") from e
        raise UserError(f"{uri}: S3 answered {code}; try again or ask who runs the store") from e
    except (BotoCoreError, Boto3Error) as e:
        raise UserError(f"{uri}: S3 failed ({' '.join(str(e).split())}); check the AWS settings") from e
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
