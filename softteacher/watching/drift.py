"""How far live traffic is from the reference: the population stability index, and in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from softteacher.errors import UserError
from softteacher.watching.profile import BINS, HISTOGRAMS, TrafficProfile

TITLES = {"score": "Scores", "class": "Classes", "size": "Object sizes", "count": "Detections an image"}
MIDDLES = {
    "score": np.arange(10) / 10 + 0.05,
    "size": 2.0 ** np.arange(-5.75, 0, 0.5),
}


def psi(reference: np.ndarray, live: np.ndarray) -> float | None:
    """Population stability index: the sum of (q - p) ln(q / p) over the bins' shares p and q.

    Users of it call less than .1 stable and more than .25 a shift (N. Siddiqi, Credit Risk Scorecards, 2006). So that
    an empty bin doesn't make it infinite, every bin gets on both sides the share that half a count has on the smaller
    side; equal shares give 0, whatever the totals.

    Args:
        reference: [B] counts.
        live: [B] counts.

    Returns:
        0 for the same shares, up to several; none where one side is empty.

    Example:
        >>> psi(np.array([50, 50]), np.array([500, 500]))
        0.0
    """
    totals = reference.sum(), live.sum()
    if not all(totals):
        return None
    half = 0.5 / min(totals)
    p, q = reference / totals[0] + half, live / totals[1] + half
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chance(bins: int, reference: int, live: int) -> float:
    """The PSI that equal traffic exceeds by chance in one of twenty samples of these sizes.

    PSI / (1/n + 1/m) follows chi square with B - 1 degrees of freedom (B. Yurdakul, Statistical Properties of the
    Population Stability Index, 2018).

    Args:
        bins: B, those that are not empty on both sides.
        reference: n.
        live: m.
    """
    if bins < 2 or not reference or not live:
        return 0.0
    from scipy.stats import chi2  # slow to import

    return float(chi2.isf(0.05, bins - 1)) * (1 / reference + 1 / live)


def compare(reference: TrafficProfile, live: TrafficProfile, threshold: float, min_images: int) -> dict[str, Any]:
    """Whether live traffic has drifted away from the reference.

    Args:
        reference: of the validation set, or of earlier traffic.
        live: the traffic.
        threshold: PSI above it is drift, unless chance alone explains it.
        min_images: of fewer nothing is said.

    Returns:
        `images`, `reference_images`; by histogram `psi` (none where one side is empty) and `limit` (threshold or
        chance, the larger); `over`: the histograms above their limit; `drift`: there are such; `enough`: there are
        `min_images`; `retrain`: both.

    Raises:
        UserError: they are of different classes.
    """
    if reference.classes != live.classes:
        raise UserError(
            f"the traffic of {live.name} version {live.version} has other classes than the reference; give the "
            "reference of that version, or the --version of this reference"
        )
    if reference.min_score != live.min_score:
        raise UserError(
            f"the traffic was recorded with min_score {live.min_score:g}, the reference with {reference.min_score:g}; "
            "record with that of the reference"
        )
    values: dict[str, float | None] = {}
    limits: dict[str, float] = {}
    over: list[str] = []
    for name in HISTOGRAMS:
        a, b = reference.histograms[name], live.histograms[name]
        value = psi(a, b)
        # boxes of one image are not independent: no more of them count than there are images
        sizes = min(reference.images, int(a.sum())), min(live.images, int(b.sum()))
        limit = max(threshold, chance(int((a + b > 0).sum()), *sizes))
        values[name], limits[name] = None if value is None else round(value, 4), round(limit, 4)
        if value is not None and value > limit:
            over.append(name)
    return {
        "images": live.images,
        "reference_images": reference.images,
        "psi": values,
        "limit": limits,
        "over": over,
        "drift": bool(over),
        "enough": live.images >= min_images,
        "retrain": bool(over) and live.images >= min_images,
    }


def explain(reference: TrafficProfile, live: TrafficProfile) -> dict[str, str]:
    """What has changed, in plain words, by histogram: the facts, whether they are much or little."""
    a, b = reference.histograms, live.histograms
    words = {}
    if a["score"].sum() and b["score"].sum():
        before, now = (float(h["score"] @ MIDDLES["score"] / h["score"].sum()) for h in (a, b))
        sure = [100 * h["class"].sum() / h["score"].sum() for h in (a, b)]
        words["score"] = (
            f"Scores {_moved(before, now, 'have dropped', 'have risen')}: mean {before:.2f} → {now:.2f}; at "
            f"least {live.min_score:g} have {sure[0]:.0f} % → {sure[1]:.0f} %."
        )
    if a["class"].sum() and b["class"].sum():
        p, q = (h["class"] / h["class"].sum() for h in (a, b))
        order = np.argsort(-np.abs(q - p), kind="stable")[:3]
        changes = [f"{live.classes[n]} {100 * p[n]:.0f} % → {100 * q[n]:.0f} %" for n in order]
        words["class"] = f"Classes that changed most: {', '.join(changes)}."
        before, now = (float(np.exp(h["size"] @ np.log(MIDDLES["size"]) / h["size"].sum())) for h in (a, b))
        words["size"] = (
            f"Objects {_moved(before, now, 'have become smaller', 'have become larger')}: typical side "
            f"{100 * before:.0f} % → {100 * now:.0f} % of the image's."
        )
    if reference.images and live.images:
        before, now = (p.histograms["class"].sum() / p.images for p in (reference, live))
        empty = [100 * p.histograms["count"][0] / p.images for p in (reference, live)]
        words["count"] = (
            f"Detections an image {_moved(before, now, 'have become fewer', 'have become more')}: mean {before:.1f} → "
            f"{now:.1f}; images without any {empty[0]:.0f} % → {empty[1]:.0f} %."
        )
    return {name: words.get(name, "Nothing to compare: one side has no such detections.") for name in HISTOGRAMS}


def labels(profile: TrafficProfile, histogram: str) -> list[str]:
    """What the bins of a histogram are called: a class, or the lowest value."""
    if histogram == "class":
        return list(profile.classes)
    if histogram == "score":
        return [f".{n}" for n in range(10)]
    if histogram == "count":
        return [str(n) for n in (0, *BINS["count"])]
    return [f"{100 * x:.0f} %" for x in (0, *BINS["size"])]


def _moved(before: float, now: float, down: str, up: str) -> str:
    change = (now - before) / max(abs(before), 1e-9)
    return "are about the same" if abs(change) < 0.05 else down if change < 0 else up
