"""The result of `watch` for Prometheus: a file for node_exporter's textfile collector, or a pushgateway."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest, push_to_gateway

from softteacher import storage
from softteacher.errors import UserError

JOB = "softteacher-watch"


def registry(facts: dict[str, Any]) -> CollectorRegistry:
    """The metrics, all with the label `model`.

    Of too few images there is no PSI: a gap in the graph is true, a wild value is not.

    Args:
        facts: of `watch`.
    """
    result, model = CollectorRegistry(), facts["name"] or "unknown"
    labels = ("model", "histogram")
    psi = Gauge("softteacher_drift_psi", "Population stability index against the reference", labels, registry=result)
    limit = Gauge("softteacher_drift_limit", "PSI from which on it is drift", labels, registry=result)
    if facts["enough"]:
        for name, value in facts["psi"].items():
            if value is not None:
                psi.labels(model, name).set(value)
                limit.labels(model, name).set(facts["limit"][name])
    images = Gauge("softteacher_traffic_images", "Images that were looked at", ("model",), registry=result)
    images.labels(model).set(facts["images"])
    ran = Gauge("softteacher_drift_last_run_timestamp_seconds", "When watch last ran", ("model",), registry=result)
    ran.labels(model).set_to_current_time()
    return result


def deliver(facts: dict[str, Any], file: str | None, push_gateway: str | None) -> None:
    """Write the metrics into a file, whole or not at all, and push them.

    Args:
        facts: of `watch`.
        file: path, if any.
        push_gateway: URL, if any; the group `job`, `model` is replaced there.

    Raises:
        UserError: it can't be written, or the pushgateway can't be reached or refuses.
    """
    metrics = registry(facts)
    if file:
        storage.write_bytes(file, generate_latest(metrics))
    if push_gateway:
        try:
            push_to_gateway(push_gateway, JOB, metrics, {"model": facts["name"] or "unknown"}, timeout=10)
        except (OSError, ValueError, HTTPException) as e:  # the last: a port that isn't HTTP's
            raise UserError(f"{push_gateway}: the pushgateway did not take the metrics ({e}); check the URL") from e
