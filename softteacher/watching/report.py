"""`report.html` of `watch`: the verdict, the PSI of each histogram, and the histograms over one another."""

from __future__ import annotations

from typing import Any

import numpy as np

from softteacher.evaluation.page import inline, render
from softteacher.evaluation.plots import overlaid_bars
from softteacher.watching.drift import TITLES, explain, labels
from softteacher.watching.profile import HISTOGRAMS, TrafficProfile

MOST_CLASSES = 10  # in the figure; those that changed most


def write_report(reference: TrafficProfile, live: TrafficProfile, facts: dict[str, Any]) -> str:
    """The page as a string of HTML without any outside reference.

    Args:
        reference: what traffic is compared with.
        live: the traffic.
        facts: of `watch`.
    """
    sure = f"of detections with a score of at least {live.min_score:g}"
    of = {
        "score": "of all detections",
        "class": sure,
        "size": "side of the box against the image's, of the same",
        "count": "how many of them",
    }
    words = explain(reference, live)
    known = [value for value in facts["psi"].values() if value is not None]
    rows = []
    for name in HISTOGRAMS:
        value, limit = facts["psi"][name], facts["limit"][name]
        rows.append({
            "title": TITLES[name],
            "of": of[name],
            "psi": value,
            "limit": limit,
            "over": name in facts["over"],
            "width": round(100 * min(1, (value or 0) / max(limit, *known, 1e-9))),
            "words": words[name],
            "picture": inline(_figure(reference, live, name)),
        })  # fmt: skip
    return render(
        "watching/report.html",
        facts=facts,
        verdict=facts["verdict"],
        largest=max(known, default=None),
        start=live.start[:16].replace("T", " "),
        end=live.end[:16].replace("T", " "),
        source=facts["live"],
        reference=facts["reference"],
        rows=rows,
    )


def _figure(reference: TrafficProfile, live: TrafficProfile, name: str) -> bytes:
    shares = [p.histograms[name] / max(1, p.histograms[name].sum()) for p in (reference, live)]
    names = labels(live, name)
    if name != "class":
        axis = {
            "score": "score, from",
            "size": "side of the box against the image's, from",
            "count": "detections, from",
        }
        return overlaid_bars(names, shares[0], shares[1], axis[name])
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:MOST_CLASSES]
    shown = sorted(order.tolist())
    axis_name = "class" if len(names) <= MOST_CLASSES else f"the {MOST_CLASSES} classes that changed most"
    return overlaid_bars([names[n] for n in shown], shares[0][shown], shares[1][shown], axis_name)
