"""The figures of reports, as PNG. Their letters are large: a telephone shows them 350 pixels wide."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"precision": "#2a6fdb", "recall": "#c2570c", "F1": "#13805a"}
MOST_POINTS = 4000  # of a scatter


def recall_curve(curve: dict[str, list[float]]) -> bytes:
    """Precision over recall.

    Args:
        curve: precisions at recalls evenly from 0 to 1, by IoU.
    """
    figure, axes = _figure()
    for (iou, precision), color in zip(curve.items(), COLORS.values(), strict=False):
        axes.plot(np.linspace(0, 1, len(precision)), precision, label=f"IoU {iou}", linewidth=2.5, color=color)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return _png(figure)


def threshold_curve(curve: dict[str, list[Any]], marked: float | None, best: float | None) -> bytes:
    """Precision, recall and F1 over the score threshold.

    Args:
        curve: `threshold`, `precision`, `recall`, `f1`; none where there is none.
        marked: above which boxes teach the classification; none where each class has a threshold of its own.
        best: threshold of the best F1.
    """
    figure, axes = _figure()
    for name, color in COLORS.items():
        values = np.array(curve[name.lower()], float)
        axes.plot(curve["threshold"], values, label=name, linewidth=2.5, color=color)
    if marked is not None:
        axes.axvline(marked, color="#444", linestyle="--", label=f"taught above {marked:g}")
    if best is not None:
        axes.axvline(best, color=COLORS["F1"], linestyle=":", linewidth=2.5, label=f"best F1 at {best:.2f}")
    axes.set(xlabel="score threshold", xlim=(curve["threshold"][0], 1), ylim=(0, 1.02))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=10.5, frameon=False)
    return _png(figure)


def iou_scatter(
    x: np.ndarray, iou: np.ndarray, bins: list[dict[str, Any]], name: str, correlation: float | None
) -> bytes:
    """IoU with the ground truth against what should foretell it, and the mean of equal shares of the boxes.

    Args:
        x: [N] score or box variance.
        iou: [N].
        bins: `middle`, `mean`, `spread` of each share.
        name: of x; a variance is drawn on a logarithmic axis.
        correlation: rank correlation.
    """
    figure, axes = _figure()
    step = -(-len(x) // MOST_POINTS) or 1
    axes.scatter(x[::step], iou[::step], s=18, alpha=0.4, linewidths=0, color=COLORS["precision"])
    axes.errorbar(
        [b["middle"] for b in bins],
        [b["mean"] for b in bins],
        [b["spread"] for b in bins],
        color=COLORS["recall"],
        marker="o",
        linewidth=2.5,
        capsize=4,
        label="mean ± spread",
    )
    if name != "score" and (x > 0).any():
        axes.set_xscale("log")
    value = "none" if correlation is None else f"{correlation:+.2f}"
    axes.set(xlabel=name, ylabel="IoU with ground truth", ylim=(-0.02, 1.02))
    axes.set_title(f"rank correlation {value}", fontsize=13)
    if bins:
        axes.legend(loc="lower left" if name != "score" else "lower right")
    return _png(figure)


def overlaid_bars(names: list[str], reference: np.ndarray, live: np.ndarray, axis: str) -> bytes:
    """Two histograms over one another: the reference as wide pale bars, live traffic as slim ones in front.

    Args:
        names: of the bins.
        reference: [B] shares.
        live: [B] shares.
        axis: what the bins are of.
    """
    figure, axes = _figure()
    at = np.arange(len(names))
    axes.bar(at, 100 * reference, width=0.9, color=COLORS["precision"], alpha=0.35, label="reference")
    axes.bar(at, 100 * live, width=0.45, color=COLORS["recall"], label="live")
    short = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
    upright = sum(map(len, short)) > 40
    axes.set_axisbelow(True)
    # names are the user's: a dollar sign in them is no formula
    axes.set_xticks(at, [s.replace("$", r"\$") for s in short], rotation=60 if upright else 0,
                    ha="right" if upright else "center", rotation_mode="anchor")  # fmt: skip
    axes.set(xlabel=axis, ylabel="share, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=12, frameon=False)
    return _png(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=12)
    axes.xaxis.label.set_fontsize(13)
    axes.yaxis.label.set_fontsize(13)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class name; the text beside the figure has it
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
