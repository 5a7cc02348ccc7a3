"""Put a model live on Triton, and take it back: the live name never serves a version that was not verified."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softteacher import storage
from softteacher.choices import check_name
from softteacher.console import say
from softteacher.errors import UserError
from softteacher.serving.canary_state import Canary, read_canary, refuse_beside
from softteacher.serving.deployment import Deployment, deployment
from softteacher.serving.follow import await_replicas
from softteacher.serving.repository import (
    Champion,
    OnnxFolder,
    Runtime,
    config,
    draw_version,
    read_onnx_folder,
    versions,
)
from softteacher.serving.smoke import read_smoke
from softteacher.serving.version_folder import open_version, read_manifest, write_version

TIMEOUT = 600.0  # seconds; Triton answers a load request when it has fetched and started the model
KEEP = 5
HERE = Path(__file__).parent
PYTHON_FILES = {"model.py": HERE / "triton_model.py", "engines.py": HERE / "engines.py"}


def deploy(
    onnx: str,
    repository: str,
    triton: str,
    name: str,
    *,
    runtime: Runtime = Runtime(),  # noqa: B008  it is frozen
    canary: float | None = None,
    decision: str | None = None,
    run: str = "",
    keep: int = KEEP,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Make an ONNX model the live version of `name`, or its canary.

    It is uploaded, read back, loaded as `{name}-candidate`, and has to answer as ONNX Runtime did at export. Only then
    is it copied to `name`, whose config lists its one live version, and asked again. On any failure the old version
    stays or returns.

    Args:
        onnx: folder that `export` wrote, local or `s3://`.
        repository: the model repository that Triton serves (with explicit model control), local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.
        runtime: Triton's backend, and the engine.
        canary: share of the requests (0 to 1) that clients send to the new version while the old one stays live, until
            `promote` or `rollback`; by default, and where nothing is live yet, the new version goes live.
        decision: folder that `gate` wrote; it must have said yes to this file, and have compared with what is
            live now.
        run: id of the pipeline run; what the same run has deployed already is not deployed again.
        keep: versions that stay in the repository for rollbacks, the live one included; a load fetches them all.
        timeout: seconds that Triton may take for loading a model, and for an answer.

    Returns:
        `name`, `version`, `previous` (the version that was live, if any), `seconds`, `smoke` (how the answer compared);
        of a canary also `canary`, its share; of many replicas `replicas`, how many serve it already.

    Raises:
        UserError: the new version is not live; the message says what happened and what is.
    """
    check_name(name)
    with storage.local_input(onnx) as folder:
        model = read_onnx_folder(folder)
        model.require(runtime)
        read_smoke(folder)
        with deployment(repository, triton, name, timeout) as target:
            facts = _of_run(target, run, model.sha256)
            if facts:
                say(f"deploy: this run has deployed it already, as version {facts['version']} of {name}")
            else:
                refuse_beside(target.canary, name, "deploy again")
                if decision:
                    _check_decision(decision, model.sha256, target.champion)
                facts = _deploy(target, model, runtime, canary, run, keep)
    return facts if "canary" in facts else facts | await_replicas(triton, name, facts["version"])


def _deploy(
    target: Deployment, model: OnnxFolder, runtime: Runtime, canary: float | None, run: str, keep: int
) -> dict[str, Any]:
    if canary and not target.champion:
        say(f"deploy: no version of {target.name} is live yet to compare a canary with; this one goes live")
        canary = None
    version = draw_version(target.repository, target.name)
    new = Champion(
        name=target.name,
        version=version,
        previous=_previous(target, keep),
        ap=model.ap,
        validation_fingerprint=model.validation_fingerprint,
        onnx_sha256=model.sha256,
        deployed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        deployed_by=_who(),
        engine=runtime.served,  # fp16 is not held to what fp32 answers
        provenance=model.provenance,
        run=run,
    )
    files: dict[str, Path | bytes] = {
        "model.onnx": model.path / runtime.onnx_file,
        "smoke.npz": model.path / "smoke.npz",
        "config.pbtxt": config(model, version, runtime).encode(),
    }
    if (model.path / "profile.json").exists():
        files["profile.json"] = model.path / "profile.json"
    if runtime.backend == "python":
        files |= PYTHON_FILES
    candidate = target.folder(version, "-candidate")
    write_version(candidate, files, new)
    target.try_candidate(version)
    if canary:
        compared = target.start_canary(Canary(version, canary), candidate)
        return _facts(new, target, compared) | {"canary": canary}
    compared = target.go_live(new, candidate)
    target.prune(new)
    return _facts(new, target, compared)


def promote(repository: str, triton: str, name: str, *, keep: int = KEEP, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Make the canary the live version: its files are checked again, and its answers.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.
        keep: as in `deploy`.
        timeout: as in `deploy`.

    Returns:
        `name`, `version`, `previous` (the version that was live), `seconds`, `smoke` (how the answer compared).

    Raises:
        UserError: there is no canary, or it isn't good; the live version and the canary stay as they are then.
    """
    check_name(name)
    with deployment(repository, triton, name, timeout) as target:
        if target.canary is None:
            raise UserError(f"{name}: there is no canary to promote; `softteacher deploy --canary 10%` starts one")
        folder = target.folder(target.canary.version, "-canary")
        target.try_canary(target.canary)
        with open_version(folder) as (manifest, _):
            new = replace(manifest.record, previous=_previous(target, keep))
        compared = target.go_live(new, folder)
        target.end_canary()
        target.prune(new)
    return _facts(new, target, compared) | await_replicas(triton, name, new.version)


def rollback(repository: str, triton: str, name: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """End the canary; without one, make the version before the live one live again.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.
        timeout: as in `deploy`.

    Returns:
        `name`, `version` (now live), `previous` (the version that was live), `seconds`, `smoke` (how the answer
        compared); where a canary was ended `ended_canary`, its version, in place of the last.

    Raises:
        UserError: there is no older version, or it doesn't answer as it did; the live version stays then.
    """
    check_name(name)
    with deployment(repository, triton, name, timeout) as target:
        if target.champion is None:
            raise UserError(
                f"{storage.join(repository, name)}: nothing is deployed there; check --repository and --name"
            )
        if target.canary:
            target.end_canary()
            if read_canary(repository, name):
                raise UserError(f"{name}: the canary could not be ended; try again")
            facts = _facts(target.champion, target, {})
            del facts["smoke"]
            return facts | {"ended_canary": target.canary.version}
        if not target.champion.previous:
            raise UserError(f"{name}: there is no older version to go back to")
        version, *older = target.champion.previous
        manifest = read_manifest(target.folder(version))
        if manifest is None:
            raise UserError(f"{name}: version {version} is not whole in {repository}, or not there any more")
        new = replace(manifest.record, previous=older)
        compared = target.go_live(new)
    return _facts(new, target, compared) | await_replicas(triton, name, version)


def _previous(target: Deployment, keep: int) -> list[int]:
    """What a new version can be rolled back to."""
    return [target.champion.version, *target.champion.previous][: keep - 1] if target.champion else []


def _of_run(target: Deployment, run: str, sha256: str) -> dict[str, Any]:
    """The facts of what a run has deployed, none if nothing: Kubeflow may try again a step that has done its work.

    Raises:
        UserError: it has, and that version was rolled back.
    """
    live, trial = target.champion, target.canary
    if not run or live is None:
        return {}

    def by_it(record: Champion) -> bool:
        return (record.run, record.onnx_sha256) == (run, sha256)

    if trial and (manifest := read_manifest(target.folder(trial.version, "-canary"))) and by_it(manifest.record):
        return _facts(manifest.record, target, target.try_canary(trial)) | {"canary": trial.share}
    if by_it(live):
        facts = _facts(live, target, target.try_live(live.version))
        return facts | {"previous": next(iter(live.previous), None)}
    for version in versions(target.repository, target.name):
        if (manifest := read_manifest(target.folder(version))) and by_it(manifest.record):
            raise UserError(f"this run has deployed it already, as version {version}, and it was rolled back since")
    return {}


def _check_decision(folder: str, sha256: str, champion: Champion | None) -> None:
    uri = storage.join(folder, "gate.json")
    try:
        gate = json.loads(storage.read_bytes(uri))
        yes, reason, compared = gate["deploy"], gate["reason"], (gate["comparison"] or {"version": None})["version"]
        same = gate["onnx_sha256"] == sha256
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{uri}: torn, or not of `softteacher gate`; run that again") from None
    if not same:
        raise UserError(f"{uri}: the gate judged another model than the one to deploy; run the gate again")
    if not yes:
        raise UserError(f"{uri}: the gate said no: {reason}")
    if compared != (champion.version if champion else None):
        with_what = f"with version {compared}" if compared else "with nothing, as nothing was live"
        raise UserError(
            f"{uri}: the gate compared {with_what}, but now"
            f" {f'version {champion.version} is live' if champion else 'nothing is'}; run the gate again"
        )


def _facts(new: Champion, target: Deployment, compared: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": new.name,
        "version": new.version,
        "previous": target.champion.version if target.champion else None,
        "seconds": round(time.monotonic() - target.started, 2),
        "smoke": compared,
    }


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
