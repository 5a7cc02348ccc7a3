"""Where a version came from. The registry keeps what Triton's repository does not: the model folder, and the record.

{registry}/{name}/{version}/model/          the model folder that `train` wrote; of the newest versions only
                            lineage.json    the record, written last; it stays
"""

from __future__ import annotations

import json
import textwrap
from datetime import UTC, datetime
from typing import Any

from softteacher import storage
from softteacher.choices import check_name
from softteacher.config import Settings, change_settings
from softteacher.console import say
from softteacher.errors import UserError
from softteacher.evaluation.metrics import numbers
from softteacher.model_folder import ModelFolder
from softteacher.serving.canary_state import canary_folder, read_canary, refuse_beside
from softteacher.serving.places import check_registry
from softteacher.serving.repository import Champion, read_champion, read_onnx_folder, versions
from softteacher.serving.version_folder import read_manifest

KEEP = 5
RECORD = "lineage.json"
_KEYS = {
    *("name", "version", "canary", "deployed_at", "deployed_by", "onnx_sha256", "data", "parents", "settings"),
    *("metrics", "gate", "git_sha", "versions", "image", "run_id"),
}  # of a record, that we read
_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # paths and fingerprints


def record(
    model: str,
    onnx: str,
    repository: str,
    name: str,
    registry: str,
    *,
    gate: str | None = None,
    run: str = "",
    keep: int = KEEP,
) -> dict[str, Any]:
    """Keep a deployed model's folder and write down where its version came from. Run twice, it does nothing new.

    Args:
        model: model folder that `train` wrote, local or `s3://`.
        onnx: onnx folder made from it, which has been deployed, as the live version or as a canary.
        repository: Triton model repository that it was deployed to.
        name: of the model in it.
        registry: folder or `s3://` prefix for the records of all models; not inside the repository.
        gate: folder with the `gate.json` of the decision.
        run: id of the pipeline run; by default the one that the training was told.
        keep: model folders that stay; older ones are removed, except that of the live version and of the canary.

    Returns:
        The record: `name`, `version`, `canary` (it was one when it was recorded), `deployed_at`, `deployed_by`,
        `onnx_sha256`, `engine`, `weights_sha256` (the teacher's), `created`, `method`, `data` (`source`, `images` and
        `fingerprint` of each part), `parents` (`champion`: the version that it replaced; `warm_start`: `source` and
        `sha256` of the weights that it started from, their `name` and `version` if they lie in a registry),
        `settings`, `metrics` (`teacher`, `student`, `onnx`), `gate`, `git_sha`, `versions` (of libraries), `image`,
        `run_id`, `recorded_at`.

    Raises:
        UserError: a folder is torn, the two, or the decision, don't belong together, the model is not deployed, or the
            registry has the record of another model for this version.
    """
    check_name(name)
    check_registry(registry, repository)
    with storage.local_input(model) as model_path, storage.local_input(onnx) as onnx_path:
        source, exported = ModelFolder(model_path, model), read_onnx_folder(onnx_path)
        if exported.provenance != source.provenance:
            raise UserError(f"{onnx}: was not exported from {model}; give the two of one run")
        decision = _decision(gate, exported.sha256) if gate else None
        deployed, on_trial = _deployed(repository, name, exported.sha256)
        place = storage.join(registry, name, str(deployed.version))
        before = _read(place)
        if before and before["onnx_sha256"] != exported.sha256:
            if not before["canary"]:
                raise UserError(f"{place}: is the record of another model; a new repository needs a new --registry")
            # of a canary that was ended, by a release that gave its number again
            storage.remove(storage.join(place, RECORD))
            storage.remove(place)
        files = sorted((f for f in model_path.iterdir() if f.is_file()), key=lambda f: f.name == "provenance.json")
        for file in files:  # the provenance last: a model folder without it is torn
            storage.copy(file, storage.join(place, "model", file.name))
        scores = source.metrics()
        facts = _facts(deployed) | {
            "canary": on_trial,
            "settings": change_settings(source.settings, exported.overrides).model_dump(mode="json"),
            "metrics": {
                "teacher": numbers(scores.get("teacher", {})),
                "student": numbers(scores.get("student", {})),
                "onnx": {"AP": exported.ap},
            },
            "gate": decision,
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        facts["run_id"] = run or facts["run_id"]
        if start := facts["parents"]["warm_start"]:
            facts["parents"]["warm_start"] = start | _registered(start["source"])
        storage.write_bytes(storage.join(place, RECORD), json.dumps(facts, indent=1).encode())
    _prune(repository, name, registry, keep)
    say(f"lineage: {name} version {deployed.version} is recorded in {place}")
    return facts


def lineage(name: str, repository: str, registry: str, version: int | None = None) -> dict[str, Any]:
    """A version and all that came before it: each replaced the next one of the list.

    Args:
        name: of the model.
        repository: Triton model repository, local or `s3://`.
        registry: that `record` wrote to.
        version: by default the live one.

    Returns:
        `name`, `live` (a version, or none), and `versions`: what `record` returned, and `model`, the URI of the model
        folder where it is still kept. Of a version without a record there is what the repository knows of it; of one
        that the repository has forgotten, too, only `version`. `recorded` says which.

    Raises:
        UserError: there is no such version, or the repository can't be read, or the name can't be served.
    """
    check_name(name)
    champion = read_champion(repository, name)
    if version is None and champion is None:
        where = storage.join(repository, name)
        raise UserError(f"{where}: nothing is live there; check --repository and the name, or give --version")
    found: dict[int, dict[str, Any]] = {}
    following = version if version is not None or champion is None else champion.version
    while following is not None and following not in found:
        place = storage.join(registry, name, str(following))
        entry = _read(place)
        recorded = entry is not None
        if entry is None and (manifest := read_manifest(storage.join(repository, name, str(following)))):
            entry = _facts(manifest.record)
        if entry is None and not found:
            raise UserError(f"{name}: there is no version {following}, neither in {registry} nor in {repository}")
        entry = entry or {"version": following, "parents": {"champion": None, "warm_start": None}}
        folder = storage.join(place, "model")
        whole = recorded and storage.exists(storage.join(folder, "provenance.json"))
        found[following] = entry | {"recorded": recorded, "model": folder if whole else None}
        following = entry["parents"]["champion"]
    return {"name": name, "live": champion.version if champion else None, "versions": list(found.values())}


def champion_model(repository: str, registry: str, name: str) -> str:
    """The URI of the live version's model folder, to start a training from; "" if there is none.

    Args:
        repository: Triton model repository, local or `s3://`.
        registry: that `record` wrote to.
        name: of the model.

    Raises:
        UserError: a canary is on trial, beside which nothing can be deployed.
    """
    champion, canary = read_champion(repository, name), read_canary(repository, name)
    refuse_beside(canary, name, "train again")
    if champion is None:
        say(f"lineage: nothing is live as {name}; a training starts from what its settings say")
        return ""
    place = storage.join(registry, name, str(champion.version))
    entry, folder = _read(place), storage.join(place, "model")
    same = entry is not None and entry["onnx_sha256"] == champion.onnx_sha256
    if same and storage.exists(storage.join(folder, "provenance.json")):
        return folder
    say(
        f"lineage: version {champion.version} of {name} is live, but its model folder is not in {registry}; a training "
        "starts from what its settings say"
    )
    return ""


def table(chain: dict[str, Any]) -> str:
    """What `lineage` returned, for people."""
    return "\n".join(line for entry in chain["versions"] for line in _lines(entry, chain))


def _decision(gate: str, sha256: str) -> dict[str, Any]:
    """What the gate said of a model; `reason` is in it."""
    uri = storage.join(gate, "gate.json")
    try:
        decision = dict(json.loads(storage.read_bytes(uri)))
        decision["reason"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{uri}: torn, or not of `softteacher gate`; run that again, or leave out --gate") from None
    if decision.get("onnx_sha256") != sha256:
        older = "doesn't say of which model; run the gate again, or leave out --gate"
        other = "is the decision on another model; give that of the same run"
        raise UserError(f"{gate}: {other if 'onnx_sha256' in decision else older}")
    return decision


def _deployed(repository: str, name: str, sha256: str) -> tuple[Champion, bool]:
    """The canary, or the newest version, that was made from an ONNX file; whether it is the canary."""
    canary = read_canary(repository, name)
    places = [canary_folder(repository, name, str(canary.version))] if canary else []
    places += [storage.join(repository, name, str(version)) for version in reversed(versions(repository, name))]
    for place in places:
        manifest = read_manifest(place)
        if manifest and manifest.record.onnx_sha256 == sha256:
            return manifest.record, canary is not None and place == places[0]
    raise UserError(f"{storage.join(repository, name)}: this model is not deployed there; run `softteacher deploy`")


def _facts(deployed: Champion) -> dict[str, Any]:
    """What Triton's repository knows of a version."""
    came = deployed.provenance
    return {
        "name": deployed.name,
        "version": deployed.version,
        "deployed_at": deployed.deployed_at,
        "deployed_by": deployed.deployed_by,
        "onnx_sha256": deployed.onnx_sha256,
        "engine": deployed.engine,
        "weights_sha256": came.get("sha256", {}).get("teacher.pt"),
        "created": came.get("created"),
        "method": came.get("method"),
        "data": came.get("data", {}),
        "parents": {
            "champion": deployed.previous[0] if deployed.previous else None,
            "warm_start": came.get("parent"),
        },
        "settings": None,
        "metrics": {"onnx": {"AP": deployed.ap}},
        "gate": None,
        "git_sha": came.get("git_sha"),
        "versions": came.get("versions", {}),
        "image": came.get("image"),
        "run_id": came.get("run_id"),
    }


def _registered(source: str) -> dict[str, Any]:
    """Name and version of a model folder that lies in a registry."""
    parent, _, last = source.rstrip("/").rpartition("/")
    entry = _read(parent) if parent and last == "model" else None
    return {"name": entry["name"], "version": entry["version"]} if entry else {}


def _read(place: str) -> dict[str, Any] | None:
    uri = storage.join(place, RECORD)
    try:
        entry: dict[str, Any] = json.loads(storage.read_bytes(uri))
        if not (set(entry) >= _KEYS and {"champion", "warm_start"} <= set(entry["parents"])):
            raise ValueError("it lacks something")
        return entry
    except storage.MissingFile:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{uri}: torn, or not ours; remove it, and `softteacher record` that model again") from None


def _prune(repository: str, name: str, registry: str, keep: int) -> None:
    """Remove the folders of old models; a training may start from those that are live or on trial."""
    folder = storage.join(registry, name)
    parts = (file.name.split("/") for file in storage.list_files(folder))
    there = {int(part[0]) for part in parts if part[0].isdecimal() and part[1:2] == ["model"]}
    champion, canary = read_champion(repository, name), read_canary(repository, name)
    used = {state.version for state in (champion, canary) if state}
    for version in sorted(there)[: max(0, len(there) - keep)]:
        if version in used:
            continue
        model = storage.join(folder, str(version), "model")
        try:
            storage.remove(storage.join(model, "provenance.json"))  # first: what is left now is no model
            storage.remove(model)
        except UserError as e:
            say(f"lineage: {model} could not be removed: {e}")


def _lines(entry: dict[str, Any], chain: dict[str, Any]) -> list[str]:
    live = " (live)" if entry["version"] == chain["live"] else ""
    head = f"{chain['name']} version {entry['version']}{live}"
    if "deployed_at" not in entry:
        return [f"{head}: no record, and the repository has forgotten it", ""]
    head += f", deployed {entry['deployed_at']} by {entry['deployed_by']}"
    rows = {
        "data": [
            f"{part}: {facts.get('images', '?')} images of {facts.get('source', '?')}, "
            f"fingerprint {facts.get('fingerprint', '?')}"
            for part, facts in entry["data"].items()
        ],
        "parents": list(_parents(entry["parents"])),
        "settings": [_settings(entry["settings"])] if entry["settings"] else [],
        "metrics": [
            f"{what}: {', '.join(f'{k} {numbers[k]:.4f}' for k in ('AP', 'AP50', 'AP75') if k in numbers)}"
            for what, numbers in entry["metrics"].items()
        ],
        "gate": [entry["gate"]["reason"]] if entry["gate"] else [],
        "code": [f"git {entry['git_sha'] or 'unknown'}", ", ".join(f"{k} {v}" for k, v in entry["versions"].items())],
        "image": [entry["image"] or "none was told"],
        "run": [entry["run_id"] or "none was told"],
        "model": [entry["model"] or ("no longer kept" if entry["recorded"] else "not recorded")],
    }
    lines = [head]
    for title, texts in rows.items():
        for n, text in enumerate(t for t in texts if t):
            first = f"  {title if not n else '':<10}"
            lines += textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=" " * 14, **_WHOLE)
    return [*lines, ""]


def _parents(parents: dict[str, Any]) -> list[str]:
    start, champion = parents["warm_start"], parents["champion"]
    lines = [f"replaced version {champion}" if champion is not None else "replaced nothing"]
    if start:
        of = f"{start['name']} version {start['version']}, " if "version" in start else ""
        lines.append(f"started from {of}{start['source']}, sha256 {start['sha256']}")
    return lines


def _settings(settings: dict[str, Any]) -> str:
    """What is not the default."""
    usual = Settings().model_dump(mode="json")
    odd = [
        f"{group}.{key}={value}"
        for group, values in settings.items()
        for key, value in values.items()
        if usual.get(group, {}).get(key) != value
    ]
    return ", ".join(odd) or "the defaults"
