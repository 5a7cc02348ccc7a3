"""Box jittering (paper, section 3.3): noisy copies of a box, and how far their refinements spread."""

from __future__ import annotations

from torch import Tensor


def jitter(boxes: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Jittered copies of boxes: `box + noise * scale * (w, h, w, h)`, not clipped.

    Args:
        boxes: [N, 4] xyxy.
        noise: [T, N, 4], standard normal, or uniform in -1 .. 1 (paper, Eq. 6).
        scale: what 1 of the noise is, as a share of width and height (at least one pixel each).

    Returns:
        [T, N, 4].
    """
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
    return boxes + noise * scale * size


def regression_variance(refined: Tensor, detected: Tensor | None = None) -> Tensor:
    """Box regression variance (paper, Eq. 6-8).

    Args:
        refined: [T, N, 4], the T refined copies of N boxes.
        detected: [N, 4], the boxes themselves, for the paper's form: all coordinates over half of their width + height
            (Eq. 7). Without them the authors' code's form: each coordinate over its own side of the mean refined box.

    Returns:
        [N], the unbiased standard deviation over the copies relative to the side, mean of 4 coordinates.
    """
    mean = refined.mean(0)
    box = mean if detected is None else detected
    size = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    if detected is not None:
        size = size.mean(1, keepdim=True)
    # not std(0): it warns where there are no boxes
    deviation = ((refined - mean).square().sum(0) / (len(refined) - 1)).sqrt()
    return (deviation / size.clamp(min=1)).mean(1)
