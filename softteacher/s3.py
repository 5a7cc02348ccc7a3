"""Objects in S3: a store that stumbles is asked again, every body is checked, every failure is one line.

What storage.py is made of; everything else uses that. The endpoint and credentials come from the usual AWS variables.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError

from softteacher.errors import Conflict, MissingFile, UserError

T = TypeVar("T")

PATIENCE = 60.0  # seconds that a store may stumble
START_PATIENCE = 3.0  # seconds for one that never answered: more likely a wrong endpoint, and that is told soon
BACKOFF = 0.5  # seconds, the mean of the first wait; doubled up to 8 s
READ_TIMEOUT = 30.0  # seconds without a byte
CHUNK = 2**20

_local = threading.local()
_answered: set[str | None] = set()  # endpoints
_TRANSIENT = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}  # besides 429 and 5xx
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_REFUSED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"}
_OUTRUN = {"412", "PreconditionFailed", "ConditionalRequestConflict"}


def split(uri: str | Path) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI."""
    bucket, _, key = str(uri)[len("s3://") :].partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket in the S3 URI; write s3://bucket/key")
    return bucket, key


def get(uri: str | Path, unless: str = "") -> tuple[bytes | None, str]:
    """The content of an object and its etag; none for the content if `unless` is the etag of what is there now."""
    (bucket, key), condition = split(uri), {"IfNoneMatch": unless} if unless else {}

    def read(client: Any) -> tuple[bytes | None, str]:
        try:
            answer = client.get_object(Bucket=bucket, Key=key, **condition)
        except ClientError as e:
            if _code(e) in {"304", "NotModified"}:
                return None, unless
            raise
        data = answer["Body"].read()
        _check(answer, hashlib.md5(data, usedforsecurity=False))
        return data, answer.get("ETag", "")

    return _patiently(uri, read)


def download(uri: str | Path, target: Path) -> None:
    """Write an object into a local file, which is torn when this fails."""
    bucket, key = split(uri)

    def read(client: Any) -> None:
        answer = client.get_object(Bucket=bucket, Key=key)
        md5 = hashlib.md5(usedforsecurity=False)
        with target.open("wb") as file:
            while chunk := answer["Body"].read(CHUNK):
                md5.update(chunk)
                file.write(chunk)
        _check(answer, md5)

    _patiently(uri, read)


def put(uri: str | Path, data: bytes | memoryview, if_match: str | None = None) -> None:
    """Write an object; `if_match` as in `storage.write_bytes`."""
    bucket, key = split(uri)
    condition = {} if if_match is None else {"IfMatch": if_match} if if_match else {"IfNoneMatch": "*"}
    tries = 0

    def write(client: Any) -> None:
        nonlocal tries
        tries += 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data), **condition)

    try:
        _patiently(uri, write)
    except Conflict:
        if tries == 1 or get(uri)[0] != data:
            raise  # else our first try had got through, and only the answer to it got lost


def upload(source: Path, uri: str | Path) -> None:
    """Write a local file of any size into an object."""
    bucket, key = split(uri)

    def write(client: Any) -> None:
        with source.open("rb") as file:  # upload_file would wrap what S3 says
            client.upload_fileobj(file, bucket, key)

    _patiently(uri, write, in_parts=True)


def copy(source: str | Path, target: str | Path) -> None:
    """Copy an object inside the store."""
    (bucket, key), (to_bucket, to_key) = split(source), split(target)
    _patiently(target, lambda client: client.copy({"Bucket": bucket, "Key": key}, to_bucket, to_key), in_parts=True)


def etag(uri: str | Path) -> str:
    """The etag of an object.

    Raises:
        MissingFile: there is none.
    """
    bucket, key = split(uri)
    return str(_patiently(uri, lambda client: client.head_object(Bucket=bucket, Key=key))["ETag"])


def delete(uri: str | Path) -> None:
    """Remove an object, if there is one."""
    bucket, key = split(uri)
    _patiently(uri, lambda client: client.delete_object(Bucket=bucket, Key=key))


def objects(uri: str | Path, prefix: str, limit: int | None = None) -> Iterator[tuple[str, int, str]]:
    """Key, size and etag of the objects of `uri`'s bucket whose keys begin with `prefix`, sorted; at most `limit`."""
    arguments: dict[str, Any] = {"Bucket": split(uri)[0], "Prefix": prefix} | ({"MaxKeys": limit} if limit else {})
    while True:
        page = _patiently(uri, lambda client: client.list_objects_v2(**arguments))
        yield from ((entry["Key"], entry["Size"], entry.get("ETag", "")) for entry in page.get("Contents", []))
        if limit or not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def _patiently(uri: str | Path, action: Callable[[Any], T], *, in_parts: bool = False) -> T:
    """What `action(client)` returns, tried again as long as there is hope.

    Args:
        uri: what errors name.
        action: must be able to run again from its beginning.
        in_parts: it makes many requests; each of them is then tried again by botocore, too.
    """

    def hopeless(state: tenacity.RetryCallState) -> bool:
        seconds, error = state.seconds_since_start or 0.0, state.outcome and state.outcome.exception()
        if isinstance(error, ClientError):
            _answered.add(endpoint())
        if endpoint() not in _answered:
            return seconds > START_PATIENCE and state.attempt_number >= 2
        # a body that breaks off after a minute deserves a second chance as well
        return seconds > PATIENCE and state.attempt_number >= (1 if in_parts else 3)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_transient),
        wait=tenacity.wait_random_exponential(multiplier=2 * BACKOFF, max=16 * BACKOFF),
        stop=hopeless,
        reraise=True,
    )
    with _explained(uri):
        result = retrying(action, _client(3 if in_parts else 1))
    _answered.add(endpoint())
    return result


def _transient(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _code(error) in _TRANSIENT or status == 429 or (status >= 500 and status != 501)
    lost = (ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError, ResponseParserError)
    return isinstance(error, lost)


def _check(answer: dict[str, Any], md5: Any) -> None:
    """Compare a body with its etag where that is its MD5: not after an upload in parts, nor with keys of the user's."""
    etag = answer.get("ETag", "").strip('"')
    encrypted = "kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer
    if re.fullmatch("[0-9a-f]{32}", etag) and not encrypted and etag != md5.hexdigest():
        raise FlexibleChecksumError(error_msg=f"MD5 {md5.hexdigest()} in place of {etag}")


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Let the store refuse a body that changed on its way; not every one compares the SHA-256 of the signature."""
    body, md5 = params["body"], hashlib.md5(usedforsecurity=False)
    if hasattr(body, "read"):
        start = body.tell()
        while chunk := body.read(CHUNK):
            md5.update(chunk)
        body.seek(start)
    else:
        md5.update(body)
    params["headers"]["Content-MD5"] = base64.b64encode(md5.digest()).decode()


def _client(tries: int) -> Any:
    """A client per thread, process (boto3 clients don't survive a fork) and setting of the AWS variables."""
    key = (os.getpid(), *sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    if getattr(_local, "key", None) != key:
        _local.key, _local.clients = key, {}
    if tries not in _local.clients:
        import boto3  # slow, and most runs on local files never need it
        from botocore.config import Config

        # S3's newer checksums only where a store has them: those behind old gateways refuse to take any
        config = Config(
            retries={"mode": "standard", "total_max_attempts": tries},
            connect_timeout=5,
            read_timeout=READ_TIMEOUT,
            signature_version="s3v4",
            s3={"addressing_style": "path"} if endpoint() else None,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_supported",
        )
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        try:
            client = boto3.Session().client("s3", config=config, region_name=region)
        except ValueError as e:
            raise UserError(f"AWS_ENDPOINT_URL_S3={endpoint()}: {e}; write http://host:port") from None
        for operation in ("PutObject", "UploadPart"):
            client.meta.events.register(f"before-call.s3.{operation}", _add_md5)
        _local.clients[tries] = client
    return _local.clients[tries]


def endpoint() -> str | None:
    """Where the store is, as the AWS variables say; none: at AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "?"))


@contextmanager
def _explained(uri: str | Path) -> Iterator[None]:
    """Turn the errors of S3 into one line that says what to do."""
    from boto3.exceptions import Boto3Error

    where = f"S3 at {endpoint() or 'AWS'}"
    later = "try again later, or ask who runs the store"
    try:
        yield
    except NoCredentialsError as e:
        raise UserError(f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from e
    except ReadTimeoutError as e:
        raise UserError(f"{uri}: {where} stalls, even when asked again; {later}") from e
    except (ResponseStreamingError, IncompleteReadError, ResponseParserError) as e:
        raise UserError(f"{uri}: {where} breaks off in the middle, even when asked again; {later}") from e
    except FlexibleChecksumError as e:
        raise UserError(f"{uri}: {where} sends other bytes than were stored, even when asked again; {later}") from e
    except (ConnectionError, HTTPClientError) as e:
        raise UserError(f"{uri}: {where} can't be reached; check AWS_ENDPOINT_URL_S3 and the network") from e
    except ClientError as e:
        code = _code(e)
        if code in _MISSING:
            what = "no such bucket" if code == "NoSuchBucket" else "no such object"
            raise MissingFile(f"{uri}: {what}; check the URI") from e
        if code in _REFUSED:
            raise UserError(f"{uri}: S3 refused access ({code}); check the credentials and the bucket's policy") from e
        if code in _OUTRUN:
            raise Conflict(f"{uri}: somebody else wrote it meanwhile; look at it and try again") from e
        raise UserError(f"{uri}: {where} answers {code}{', even when asked again' * _transient(e)}; {later}") from e
    except (BotoCoreError, Boto3Error) as e:
        raise UserError(f"{uri}: S3 failed ({' '.join(str(e).split())}); check the AWS settings") from e
