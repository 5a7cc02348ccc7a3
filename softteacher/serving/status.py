"""What is deployed under a name, by the repository; what is served and how well, by Triton; and where they disagree."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from typing import Any

from rich.console import Console
from rich.table import Table

from softteacher import storage
from softteacher.choices import check_name
from softteacher.errors import UserError
from softteacher.serving.canary_state import Canary, read_canary
from softteacher.serving.claim import claim_uri, read_claim, seconds
from softteacher.serving.client import connect, explained
from softteacher.serving.repository import Champion, read_champion, versions
from softteacher.serving.version_folder import read_manifest

TIMEOUT = 30.0  # seconds


def status(repository: str, triton: str, name: str, metrics: str | None = None) -> dict[str, Any]:
    """What is deployed and what is served.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of Triton's HTTP service.
        name: of the model.
        metrics: URL of Triton's metrics, `http://host:port/metrics`; by default they are not asked.

    Returns:
        `name`; `live`, the version by the champion pointer; `canary`, `{"version", "share"}`, or none;
        `versions`: for each `version`, `state` (live, canary, previous: a rollback goes there, retired: the next
        deployment removes it, incomplete: of a deployment that was killed), and of a whole one `ap`, `deployed_at`,
        `deployed_by`, `git_sha`, `data_fingerprint` (of the labelled images);
        `served`: for each version that Triton has of the model and of its canary `model`, `version`, `ready`,
        `requests`, `failures`, and the mean `queue_ms` and `compute_ms` of a request, since Triton loaded it;
        `metrics`: for each of Triton's counters of the two `metric`, `model`, `version`, `value`, since Triton started;
        `notes`: what is wrong, in plain words.

    Raises:
        UserError: the repository isn't there or can't be read, or what is in it is torn, or the name can't be served.
    """
    check_name(name)
    champion, canary = read_champion(repository, name), read_canary(repository, name)
    models = [name, f"{name}-canary"]
    served: list[dict[str, Any]] = []
    counters: list[dict[str, Any]] = []
    notes = list(_repository_notes(repository, name, champion))
    try:
        served = _served(triton, models)
        notes += _disagreements(name, champion, canary, served)
    except UserError as e:
        notes.append(str(e))
    if metrics:
        try:
            counters = _counters(metrics, models)
        except UserError as e:
            notes.append(str(e))
    return {
        "name": name,
        "live": champion.version if champion else None,
        "canary": {"version": canary.version, "share": canary.share} if canary else None,
        "versions": _versions(repository, name, champion, canary),
        "served": served,
        "metrics": counters,
        "notes": notes,
    }


def table(state: dict[str, Any]) -> str:
    """What `status` returned, for people."""
    deployed = Table("version", "state", "AP", "deployed", "by", "git", "data", title=f"{state['name']}: deployed")
    for row in state["versions"]:
        share = f" {state['canary']['share']:.0%}" if row["state"] == "canary" else ""
        ap = "" if row["ap"] is None else f"{row['ap']:.4f}"
        texts = (str(row[key] or "")[:10] for key in ("git_sha", "data_fingerprint"))
        deployed.add_row(str(row["version"]), row["state"] + share, ap, row["deployed_at"], row["deployed_by"], *texts)
    loaded = Table(
        *("model", "version", "ready", "requests", "failures", "queue ms", "compute ms"), title="on Triton since loaded"
    )
    for row in state["served"]:
        times = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("queue_ms", "compute_ms"))
        ready = "yes" if row["ready"] else "no"
        loaded.add_row(row["model"], str(row["version"]), ready, str(row["requests"]), str(row["failures"]), *times)
    counted = Table("model", "version", "metric", "value", title="Triton's metrics since it started")
    for row in state["metrics"]:
        counted.add_row(row["model"], row["version"], row["metric"], f"{row['value']:.0f}")
    console = Console(width=120)
    with console.capture() as capture:
        for grid in (deployed, loaded, counted):
            if grid.row_count:
                console.print(grid)
        for note in state["notes"]:
            console.print(f"! {note}", markup=False, highlight=False, soft_wrap=True)
    return capture.get()


def _versions(repository: str, name: str, champion: Champion | None, canary: Canary | None) -> list[dict[str, Any]]:
    states = dict.fromkeys(champion.previous, "previous") | {champion.version: "live"} if champion else {}
    found = [(name, version, states.get(version, "retired")) for version in versions(repository, name)]
    if canary:
        found.append((f"{name}-canary", canary.version, "canary"))
    rows = []
    for model, version, state in found:
        manifest = read_manifest(storage.join(repository, model, str(version)))
        record = manifest.record if manifest else None
        labeled = record.provenance.get("data", {}).get("labeled", {}) if record else {}
        rows.append({
            "version": version,
            "state": state if record else "incomplete",
            "ap": record.ap if record else None,
            "deployed_at": record.deployed_at if record else None,
            "deployed_by": record.deployed_by if record else None,
            "git_sha": record.provenance.get("git_sha") if record else None,
            "data_fingerprint": labeled.get("fingerprint"),
        })  # fmt: skip
    return rows


def _served(triton: str, models: list[str]) -> list[dict[str, Any]]:
    """Triton's statistics of the versions that it has in memory."""
    rows = []
    with closing(connect(triton, TIMEOUT)) as server, explained(triton):
        for model in models:
            if not server.is_model_ready(model):
                continue
            for entry in server.get_inference_statistics(model)["model_stats"]:
                stats = entry["inference_stats"]
                done = int(stats["success"].get("count", 0))
                queue = int(stats["queue"].get("ns", 0))
                total = int(stats["success"].get("ns", 0))
                rows.append({
                    "model": model,
                    "version": int(entry["version"]),
                    "ready": bool(server.is_model_ready(model, entry["version"])),
                    "requests": done + int(stats["fail"].get("count", 0)),
                    "failures": int(stats["fail"].get("count", 0)),
                    "queue_ms": queue / done / 1e6 if done else None,
                    "compute_ms": (total - queue) / done / 1e6 if done else None,
                })  # fmt: skip
    return rows


def _counters(url: str, models: list[str]) -> list[dict[str, Any]]:
    """Triton's own request counters of the models, and those that our model exports."""
    from prometheus_client.parser import text_string_to_metric_families

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # like the client: never by a proxy
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except (OSError, ValueError, HTTPException) as e:  # the last: a port that isn't HTTP's
        raise UserError(f"{url}: no metrics of Triton there ({e}); check --metrics") from None
    return [
        {
            # the parser adds a suffix to counters that Triton names without one
            "metric": sample.name.removesuffix("_total") if sample.name.startswith("nv_") else sample.name,
            "model": sample.labels["model"],
            "version": sample.labels.get("version", ""),
            "value": sample.value,
        }
        for family in families
        for sample in family.samples
        if sample.labels.get("model") in models and sample.name.startswith(("nv_inference_", "softteacher_"))
    ]


def _repository_notes(repository: str, name: str, champion: Champion | None) -> Iterator[str]:
    claim = read_claim(claim_uri(repository, name))
    if claim:
        yield f"{claim['host']} has been deploying {name} for {seconds(claim)} s, unless that run was killed"
    if champion is None:
        yield f"nothing is deployed as {name} in {repository}; check --repository and --name"
    elif read_manifest(storage.join(repository, name, str(champion.version))) is None:
        yield f"version {champion.version} should be live, but is not whole in {repository}; deploy again"


def _disagreements(
    name: str, champion: Champion | None, canary: Canary | None, served: list[dict[str, Any]]
) -> Iterator[str]:
    wanted = {name: champion.version if champion else None, f"{name}-canary": canary.version if canary else None}
    for model, version in wanted.items():
        ready = [row["version"] for row in served if row["model"] == model and row["ready"]]
        if version is not None and not ready:
            yield (
                f"Triton serves no {model}, version {version} should be: it was started without --load-model={model},"
                " or could not load it; its log says which"
            )
        elif version is not None and ready != [version]:
            there = ", ".join(map(str, ready))
            yield (
                f"Triton serves version {there} of {model}, the repository says {version}: a deployment runs, or was"
                " killed; the next deploy, promote or rollback mends it"
            )
        elif version is None and ready:
            yield f"Triton serves {model}, which the repository doesn't know as deployed: is it the right repository?"
