"""Put a model live on Triton, and take it back: the live name never serves a version that was not verified."""

from __future__ import annotations

import json
import re
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError
from softteacher.serving.client import connect, explained, infer
from softteacher.serving.outputs import MASKS, OUTPUTS
from softteacher.serving.repository import (
    Backend,
    Champion,
    champion_etag,
    config,
    read_champion,
    read_onnx_folder,
    read_record,
    versions,
    write_champion,
)

LOAD_TIMEOUT = 600.0  # seconds; Triton answers a load request when it has fetched and started the model
CLAIM_TIMEOUT = 3600.0  # seconds after which a deployment that left its claim behind counts as dead
BOX_TOLERANCE = 0.5  # pixels of the canvas
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 0.05  # probability; a box that is moved within its tolerance moves its mask


def deploy(
    onnx: str,
    repository: str,
    triton: str,
    name: str,
    *,
    backend: Backend = "python",
    gpu: bool = False,
    keep: int = 5,
) -> dict[str, Any]:
    """Make an ONNX model the live version of `name`.

    It is first loaded as `{name}-candidate` and has to answer as ONNX Runtime did at export. Only then is it copied to
    `name`, whose config lists its one live version, and asked again. On any failure the old version stays or returns.

    Args:
        onnx: folder that `export` wrote, local or `s3://`.
        repository: the model repository that Triton serves (with explicit model control), local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.
        backend: `python` where Triton has that backend only, `onnxruntime` in NVIDIA's container.
        gpu: run on Triton's GPUs.
        keep: versions that stay in the repository for rollbacks, the live one included; a load fetches them all.

    Returns:
        `name`, `version`, `previous` (the version that was live, if any), `seconds`, `smoke` (how the answer compared).

    Raises:
        UserError: the new version is not live; the message says what happened and what is.
    """
    started = time.monotonic()
    _check_name(name)
    with storage.local_input(onnx) as folder:
        model, smoke = read_onnx_folder(folder), _read_smoke(folder)
        with _deployment(repository, triton, name) as target:
            live, old = storage.join(repository, name), target.champion
            there = versions(repository, name)
            if there and not old and not any(read_record(repository, name, v) for v in there):
                raise UserError(
                    f"{live}: holds a model that `softteacher deploy` did not put there; choose another --name"
                )
            new = Champion(
                name=name,
                version=max(there, default=0) + 1,
                previous=[old.version, *old.previous][: keep - 1] if old else [],
                ap=model.ap,
                validation_fingerprint=model.validation_fingerprint,
                onnx_sha256=model.sha256,
                deployed_at=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance=model.provenance,
            )
            upload, final = storage.join(f"{live}-candidate", str(new.version)), storage.join(live, str(new.version))
            files: dict[str, Path] = {n: folder / n for n in ("model.onnx", "smoke.npz")}
            if backend == "python":
                files["model.py"] = Path(__file__).with_name("triton_model.py")
            for file, source in files.items():
                storage.copy(source, storage.join(upload, file))
            text = config(model, new.version, backend=backend, gpu=gpu)
            storage.write_bytes(storage.join(upload, "config.pbtxt"), text.encode())
            storage.write_bytes(storage.join(upload, "record.json"), new.to_json())
            target.activate(f"{name}-candidate", new.version, smoke)
            try:
                storage.copy(upload, final)
                compared = target.go_live(new, smoke)
            except BaseException:
                storage.remove(final)
                raise
            for version in set(there) - set(new.previous):
                storage.remove(storage.join(live, str(version)))
    return _facts(new, old, started, compared)


def rollback(repository: str, triton: str, name: str) -> dict[str, Any]:
    """Make the version before the live one live again.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.

    Returns:
        `name`, `version`, `previous` (the version that was live), `seconds`, `smoke` (how the answer compared).

    Raises:
        UserError: there is no older version, or it doesn't answer as it did; the live version stays then.
    """
    started = time.monotonic()
    _check_name(name)
    with _deployment(repository, triton, name) as target:
        if target.champion is None:
            raise UserError(
                f"{storage.join(repository, name)}: nothing is deployed there; check --repository and --name"
            )
        if not target.champion.previous:
            raise UserError(f"{name}: there is no older version to go back to")
        version, *older = target.champion.previous
        record = read_record(repository, name, version)
        if record is None:
            raise UserError(f"{name}: version {version} is not in {repository} any more")
        with storage.local_input(storage.join(repository, name, str(version), "smoke.npz")) as file:
            smoke = _read_smoke(file.parent)
        new = replace(record, previous=older)
        compared = target.go_live(new, smoke)
    return _facts(new, target.champion, started, compared)


@dataclass(frozen=True)
class _Deployment:
    """One change of what is live under `name`."""

    server: Any
    url: str
    repository: str
    name: str
    champion: Champion | None  # at the start
    etag: str  # of its pointer

    def go_live(self, new: Champion, smoke: dict[str, np.ndarray]) -> dict[str, Any]:
        """Switch to a version that is in the repository; back again if it fails. Returns how the answer compared."""
        try:
            compared = self.activate(self.name, new.version, smoke)
            write_champion(self.repository, new, self.etag)
            return compared
        except BaseException as e:
            try:
                if self.champion:
                    self.activate(self.name, self.champion.version)
                else:
                    with explained(self.url):
                        self.server.unload_model(self.name)
                    storage.remove(storage.join(self.repository, self.name, "config.pbtxt"))
            except UserError as worse:
                raise _NotRestored(
                    f"{e}; and the state before could not be restored ({worse}): look at {self.url}"
                ) from e
            raise

    def activate(self, name: str, version: int, smoke: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Make `version` the one that Triton serves under `name`, and compare its answer with the recorded one."""
        folder = storage.join(self.repository, name)
        for wait in (1.1, 0):
            storage.copy(storage.join(folder, str(version), "config.pbtxt"), storage.join(folder, "config.pbtxt"))
            with explained(f"{self.url} (which has to serve {self.repository})"):
                self.server.load_model(name)
                if self.server.is_model_ready(name, str(version)):
                    break
            # dates on S3 count seconds: Triton takes a config that changed twice in one for unchanged
            time.sleep(wait)
        else:
            raise UserError(f"Triton at {self.url} loaded {name}, but not version {version}: does it serve {folder}?")
        return _compare(self.server, self.url, name, version, smoke) if smoke else {}


@contextmanager
def _deployment(repository: str, triton: str, name: str) -> Iterator[_Deployment]:
    """Connect, keep others out, and leave no candidate behind. Errors from the block tell what is live."""
    with closing(connect(triton, LOAD_TIMEOUT)) as server:
        versions(repository, name)  # can the repository be read?
        claim = storage.join(repository, f"{name}-candidate", "claim.json")
        _claim(claim, name)
        try:
            etag = champion_etag(repository, name)
            champion = read_champion(repository, name)
            live = f"version {champion.version} stays live" if champion else "nothing is live"
            try:
                yield _Deployment(server, triton, repository, name, champion, etag)
            except _NotRestored:
                raise
            except UserError as e:
                raise UserError(f"{e} ({name}: {live})") from e
        finally:
            candidate = storage.join(repository, f"{name}-candidate")
            for undo in (lambda: server.unload_model(f"{name}-candidate"), lambda: storage.remove(candidate)):
                try:
                    with explained(triton):
                        undo()
                except UserError as e:
                    say(f"{candidate}: could not be cleaned up: {e}")


def _claim(uri: str, name: str) -> None:
    """Two deployments of one name at a time would mix their files (on S3; a local repository has one user)."""
    mine = json.dumps({"host": socket.gethostname(), "time": time.time()}).encode()
    etag = storage.etag(uri)
    if etag:
        theirs = json.loads(storage.read_bytes(uri))
        if time.time() - theirs["time"] < CLAIM_TIMEOUT:
            raise UserError(
                f"{name}: {theirs['host']} has been deploying it for {time.time() - theirs['time']:.0f} s;"
                f" wait, or remove {uri} if that run is dead"
            )
    storage.write_bytes(uri, mine, if_match=etag)


class _NotRestored(UserError):
    pass


def _read_smoke(folder: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(folder / "smoke.npz") as file:
            return {name: file[name] for name in {"images", *OUTPUTS, *file.files}}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{folder / 'smoke.npz'}: torn, or not ours ({e}); run `softteacher export` again") from None


def _compare(server: Any, url: str, name: str, version: int, smoke: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ask `name` about the smoke images, naming no version, and compare with ONNX Runtime's answer at export."""
    answer, answered = infer(server, url, name, smoke["images"])
    if answered != str(version):
        raise UserError(f"Triton at {url} answered with version {answered} of {name} instead of {version}")
    detections, box_difference, score_difference = 0, 0.0, 0.0
    for i, n in enumerate(smoke["num_detections"][:, 0]):
        if (got := int(answer["num_detections"][i, 0])) != n:
            raise UserError(f"smoke inference with {name} {version}: image {i} has {got} detections, {n} were recorded")
        boxes, scores, masks = (
            np.abs(answer[key][i, :n] - smoke[key][i, :n]).max(initial=0) if key in smoke else 0.0
            for key in ("detection_boxes", "detection_scores", MASKS)
        )
        same_classes = np.array_equal(answer["detection_classes"][i, :n], smoke["detection_classes"][i, :n])
        if not (boxes <= BOX_TOLERANCE and scores <= SCORE_TOLERANCE and masks <= MASK_TOLERANCE and same_classes):
            raise UserError(
                f"smoke inference with {name} {version}: image {i} differs from what was recorded at export: boxes by"
                f" {boxes:.3g} px, scores by {scores:.2g}, classes {'agree' if same_classes else 'differ'}"
                + (f", masks by {masks:.2g}" if MASKS in smoke else "")
            )
        detections += int(n)
        box_difference, score_difference = max(box_difference, float(boxes)), max(score_difference, float(scores))
    return {
        "images": len(smoke["images"]),
        "detections": detections,
        "max_box_difference": box_difference,
        "max_score_difference": score_difference,
    }


def _facts(new: Champion, old: Champion | None, started: float, compared: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": new.name,
        "version": new.version,
        "previous": old.version if old else None,
        "seconds": round(time.monotonic() - started, 2),
        "smoke": compared,
    }


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"--name {name}: only letters, digits, - and _ make a model's name")
