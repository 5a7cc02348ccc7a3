"""Histograms by hand, adding, and what is no profile."""

import json

import numpy as np
import pytest

from softteacher.detections import Detections
from softteacher.errors import MissingFile, UserError
from softteacher.watching.profile import BINS, HISTOGRAMS, NoProfile, TrafficProfile, reference_profile
from tests.samples import dataset, write_coco

CLASSES = ("cat", "dog", "cow")


def detections(*rows):
    """(score, label, side of a square box in pixels) each."""
    score, label, side = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [], np.empty(0))
    boxes = np.stack([np.full(len(side), 3), np.full(len(side), 2), 3 + np.asarray(side), 2 + np.asarray(side)], 1)
    return Detections(boxes.astype(np.float32), np.array(score, np.float32), np.array(label, np.int64))


def nonzero(histogram):
    return {int(n): int(histogram[n]) for n in np.flatnonzero(histogram)}


def test_every_value_in_its_bin():
    profile = TrafficProfile(CLASSES)
    # 100 x 25 pixels: a box of 50 x 50 covers all, 12.5 a sixteenth (a quarter of the side), 0 nothing
    found = detections((1.0, 0, 50), (0.95, 1, 12.5), (0.3, 1, 0), (0.29, 2, 50), (0.0, 2, 50))
    profile.observe(found, (100, 25), "2026-11-02T10:00:00+00:00")
    profile.observe(detections(), (100, 25), "2026-11-01T10:00:00+00:00")
    assert profile.images == 2
    assert nonzero(profile.histograms["score"]) == {0: 1, 2: 1, 3: 1, 9: 2}
    assert profile.histograms["class"].tolist() == [1, 2, 0]
    assert nonzero(profile.histograms["size"]) == {0: 1, 8: 1, 11: 1}
    assert (BINS["size"][7], BINS["size"][8]) == (0.25, pytest.approx(0.25 * 2**0.5))
    assert nonzero(profile.histograms["count"]) == {0: 1, 3: 1}
    assert (profile.start, profile.end) == ("2026-11-01T10:00:00+00:00", "2026-11-02T10:00:00+00:00")


@pytest.mark.parametrize(
    ("count", "bin_"), [(0, 0), (1, 1), (4, 4), (5, 5), (6, 5), (7, 6), (49, 9), (50, 10), (99, 10)]
)
def test_counts(count, bin_):
    profile = TrafficProfile(CLASSES)
    profile.observe(detections(*[(0.9, 0, 5)] * count, (0.1, 0, 5)), (100, 100))
    assert nonzero(profile.histograms["count"]) == {bin_: 1}


def test_a_foreign_label_counts_nothing():
    for label in (3, -1):
        profile = TrafficProfile(CLASSES)
        with pytest.raises(UserError, match=f"label {label}, but there are 3 classes"):
            profile.observe(detections((0.9, label, 5)), (10, 10))
        assert profile.images == sum(h.sum() for h in profile.histograms.values()) == 0
        profile.observe(detections((0.1, label, 5)), (10, 10))  # too unsure to have a class


def test_odd_numbers_are_counted_and_harm_nothing():
    profile = TrafficProfile(CLASSES)
    found = detections((np.nan, 0, 5), (0.9, 0, np.nan), (2.0, 0, 1e9), (0.9, 0, -5))
    profile.observe(found, (0, 0))
    assert [int(h.sum()) for h in profile.histograms.values()] == [4, 3, 3, 1]


def test_sum_is_that_of_all_images():
    rng = np.random.default_rng(0)
    parts, whole = [TrafficProfile(CLASSES, "n", str(k)) for k in range(3)], TrafficProfile(CLASSES)
    for k in range(30):
        rows = [(rng.random(), rng.integers(3), rng.integers(1, 90)) for _ in range(rng.integers(0, 9))]
        for profile in (parts[k % 3], whole):
            profile.observe(detections(*rows), (100, 90), f"2026-11-{k + 1:02}")
    total = parts[0] + parts[1] + parts[2]
    assert (total.images, total.name, total.version) == (30, "n", "")
    assert (total.start, total.end) == ("2026-11-01", "2026-11-30")
    for name in HISTOGRAMS:
        np.testing.assert_array_equal(total.histograms[name], whole.histograms[name])
    assert whole.histograms["count"].sum() == 30
    for other in (TrafficProfile(CLASSES[:2]), TrafficProfile(CLASSES, min_score=0.5)):
        with pytest.raises(UserError, match="can't be added"):
            whole + other


def test_there_and_back(s3, tmp_path):
    profile = TrafficProfile(("ü 方", "b"), "cards", "3", 0.4, "2026-11-01", "2026-11-02")
    profile.observe(detections((0.9, 1, 5)), (10, 10))
    for uri in (f"{s3}/a/b.json", str(tmp_path / "a" / "b.json")):
        profile.write(uri)
        back = TrafficProfile.read(uri)
        assert {k: v for k, v in vars(back).items() if k != "histograms"} == {
            k: v for k, v in vars(profile).items() if k != "histograms"
        }
        for name in HISTOGRAMS:
            np.testing.assert_array_equal(back.histograms[name], profile.histograms[name])
    size = len((tmp_path / "a" / "b.json").read_bytes())
    for _ in range(1000):
        profile.observe(detections((0.9, 1, 5)), (10, 10))
    profile.write(str(tmp_path / "later.json"))
    assert len((tmp_path / "later.json").read_bytes()) < size + 30  # digits only


def test_what_is_no_profile(tmp_path):
    file = tmp_path / "p.json"
    TrafficProfile(CLASSES).write(str(file))
    good = json.loads(file.read_text())

    def histograms(**changed):
        return good | {"histograms": good["histograms"] | changed}

    cases = [
        [], {}, 7, good | {"format": "other"}, good | {"classes": 3}, good | {"classes": ["cat"]},
        good | {"bins": good["bins"] | {"score": [0.5]}}, histograms(score=[0] * 9), histograms(score=[-1] * 10),
        histograms(score="x"), histograms(score=[10**30] * 10), {k: v for k, v in good.items() if k != "end"},
    ]  # fmt: skip
    for text in ("", "{", "[" * 100_000, "\ud800", *map(json.dumps, cases)):
        file.write_text(text, errors="surrogatepass")
        with pytest.raises(NoProfile, match=r"p\.json: no traffic profile"):
            TrafficProfile.read(str(file))
    with pytest.raises(MissingFile):
        TrafficProfile.read(str(tmp_path / "none.json"))


def test_reference_is_the_validation_set_s(tmp_path):
    data = dataset(write_coco(tmp_path))
    found = {image.id: detections(*[(0.9, 0, 6)] * n) for n, image in enumerate(data.images)}
    profile = reference_profile(data, found)
    assert profile.classes == tuple(data.classes)
    assert profile.images == len(data)
    assert profile.histograms["class"].sum() == sum(range(len(data)))
