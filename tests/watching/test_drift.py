"""PSI by hand and against chance, the verdict's numbers, and the words."""

import math

import numpy as np
import pytest

from softteacher.errors import UserError
from softteacher.watching.drift import MIDDLES, chance, compare, explain, labels, psi
from softteacher.watching.profile import BINS, HISTOGRAMS, TrafficProfile
from tests.watching.test_profile import CLASSES, detections


def profile(images, *, score=0.85, label=1, side=25, count=2, seed=0, **facts):
    """Traffic of images 100 x 100 whose detections lie around these values."""
    rng = np.random.default_rng(seed)
    result = TrafficProfile(CLASSES, **facts)
    for _ in range(images):
        rows = [
            (np.clip(rng.normal(score, 0.1), 0, 1), label if rng.random() < 0.7 else 0, side * rng.uniform(0.7, 1.4))
            for _ in range(rng.poisson(count))
        ]
        result.observe(detections(*rows), (100, 100))
    return result


def test_psi_by_hand():
    a, b = np.array([60, 40]), np.array([300, 700])
    half = 0.5 / 100
    p, q = (np.array(x) + half for x in ([0.6, 0.4], [0.3, 0.7]))
    p, q = p / p.sum(), q / q.sum()
    by_hand = sum((y - x) * math.log(y / x) for x, y in zip(p, q, strict=True))
    assert psi(a, b) == pytest.approx(by_hand)
    assert psi(a, b) == pytest.approx(psi(b, a))
    assert by_hand == pytest.approx(0.3 * math.log(0.7 / 0.4) + 0.3 * math.log(0.6 / 0.3), rel=0.03)  # hardly smoothed


def test_psi_of_empty_bins_and_sides():
    assert psi(np.array([5, 0, 5]), np.array([500, 0, 500])) == 0
    gone = psi(np.array([50, 50, 0]), np.array([100, 0, 0]))
    assert gone is not None
    assert math.isfinite(gone)
    assert gone > 1
    assert psi(np.zeros(3, int), np.array([1, 2, 3])) is None
    assert psi(np.array([1, 2, 3]), np.zeros(3, int)) is None


@pytest.mark.parametrize(("bins", "quantile"), [(2, 3.8415), (4, 7.8147), (11, 18.307)])  # of chi square at 95 %
def test_chance_is_chi_square(bins, quantile):
    assert chance(bins, 100, 300) == pytest.approx(quantile * (1 / 100 + 1 / 300), rel=1e-4)


def test_equal_traffic_exceeds_chance_rarely():
    rng = np.random.default_rng(1)
    shares = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    values = [psi(rng.multinomial(400, shares), rng.multinomial(250, shares)) for _ in range(2000)]
    assert 0.02 < np.mean(np.array(values) > chance(6, 400, 250)) < 0.08


def test_chance_of_nothing():
    assert (chance(1, 5, 5), chance(10, 0, 5), chance(10, 5, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "over"),
    [
        ({}, []),
        ({"score": 0.6}, ["score"]),
        ({"label": 2}, ["class"]),
        ({"side": 9}, ["size"]),
        ({"count": 6}, ["count"]),
        ({"score": 0.1}, ["score", "count"]),  # the few that remain above min_score look as ever
    ],
)
def test_each_histogram_sees_its_change(changed, over):
    facts = compare(profile(500), profile(500, seed=1, **changed), 0.25, 200)
    assert facts["over"] == over
    assert (facts["drift"], facts["retrain"]) == (bool(over), bool(over))
    assert set(facts["psi"]) == set(facts["limit"]) == set(HISTOGRAMS)
    if not changed:
        assert max(facts["psi"].values()) < 0.1


def test_too_few_images_never_retrain():
    facts = compare(profile(500), profile(199, score=0.5, side=9), 0.25, 200)
    assert (facts["drift"], facts["enough"], facts["retrain"]) == (True, False, False)
    assert compare(profile(500), profile(200, score=0.5, side=9), 0.25, 200)["retrain"]


def test_a_handful_of_images_is_no_drift():
    """A PSI above the threshold that chance explains."""
    facts = compare(profile(60), profile(15, seed=5), 0.05, 1)
    assert max(facts["psi"].values()) > 0.05
    assert not facts["drift"]


def test_equal_traffic_with_few_boxes_is_no_drift():
    """One box in ten images: the histograms of boxes are of fifty and of thirty."""
    pairs = [(profile(500, count=0.1, seed=n), profile(300, count=0.1, seed=100 + n)) for n in range(20)]
    assert sum(compare(*pair, 0.25, 200)["retrain"] for pair in pairs) <= 4
    assert compare(pairs[0][0], profile(3000, count=0.1, label=2, seed=9), 0.25, 200)["over"] == ["class"]


def test_no_detections_at_all():
    facts = compare(profile(300), profile(300, count=0), 0.25, 200)
    assert [k for k, v in facts["psi"].items() if v is None] == ["score", "class", "size"]
    assert facts["over"] == ["count"]
    assert "images without any 13 % → 100 %" in explain(profile(300), profile(300, count=0))["count"]


def test_other_classes_or_scores():
    with pytest.raises(UserError, match="cards version 4 has other classes than the reference"):
        compare(TrafficProfile(CLASSES[::-1]), TrafficProfile(CLASSES, "cards", "4"), 0.25, 1)
    with pytest.raises(UserError, match=r"min_score 0\.5, the reference with 0\.3"):
        compare(TrafficProfile(CLASSES), TrafficProfile(CLASSES, min_score=0.5), 0.25, 1)


def test_words():
    before, same = profile(400), profile(400, seed=1)
    words = explain(before, profile(400, seed=1, score=0.6, label=2, side=9, count=4))
    assert words["score"] == "Scores have dropped: mean 0.84 → 0.60; at least 0.3 have 100 % → 100 %."
    assert words["class"].startswith("Classes that changed most: dog 70 % → 0 %, cow 0 % → ")
    assert words["size"] == "Objects have become smaller: typical side 25 % → 9 % of the image's."
    assert words["count"] == "Detections an image have become more: mean 1.9 → 4.1; images without any 14 % → 2 %."
    for name, text in explain(before, same).items():
        assert "about the same" in text or name == "class"
    back = explain(profile(400, score=0.6, side=9, count=4), before)
    assert [word in back[k] for k, word in (("score", "risen"), ("size", "larger"), ("count", "fewer"))] == [True] * 3
    assert set(explain(before, TrafficProfile(CLASSES))) == set(HISTOGRAMS)


def test_labels_and_middles_fit_the_bins():
    empty = TrafficProfile(CLASSES)
    for name in HISTOGRAMS:
        assert len(labels(empty, name)) == len(empty.histograms[name])
    assert labels(empty, "count") == ["0", "1", "2", "3", "4", "5", "7", "10", "15", "25", "50"]
    for name, middles in MIDDLES.items():
        assert len(middles) == len(empty.histograms[name])
        np.testing.assert_array_equal(np.searchsorted(BINS[name], middles, side="right"), np.arange(len(middles)))
