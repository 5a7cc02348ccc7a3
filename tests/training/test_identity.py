"""Which settings make another run, and which another burn-in."""

import pytest

from softteacher.config import load_settings
from softteacher.training.checkpoint import difference
from softteacher.training.identity import burn_in_of, identity
from tests.samples import dataset, write_coco


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("data"))
    return {"labeled": dataset(folder), "unlabeled": dataset(folder), "validation": dataset(folder, "val")}


def differs(sets, *overrides, of=lambda run: run):
    return difference(*(of(identity(load_settings("small", chosen), sets)) for chosen in ([], overrides)))


@pytest.mark.parametrize("override", ["training.threads=1", "data.workers=0", "training.checkpoint_every=7"])
def test_what_decides_nothing(sets, override):
    assert not differs(sets, override)


def test_the_batch_counts_as_a_whole(sets):
    assert not differs(sets, "training.labeled_per_batch=2", "training.unlabeled_per_batch=2", "training.accumulate=2")
    assert "batch is '4 + 4 images', there it was '4 + 8 images'" in differs(sets, "training.unlabeled_per_batch=8")


@pytest.mark.parametrize(
    ("override", "other"),
    [
        ("method.name=stac", False),
        ("method.threshold=fixed", False),
        ("training.unlabeled_per_batch=8", False),
        ("training.labeled_per_batch=8", True),
        ("method.ema_momentum=0.9", True),
        ("method.burn_in=0.2", True),
        ("training.lr=1", True),
    ],
)
def test_what_makes_another_burn_in(sets, override, other):
    assert differs(sets, override)
    assert bool(differs(sets, override, of=burn_in_of)) is other


def test_other_images(sets, tmp_path):
    other = identity(load_settings("small"), sets | {"unlabeled": dataset(write_coco(tmp_path), "val")})
    mine = identity(load_settings("small"), sets)
    assert difference(mine, other).startswith("data set unlabeled is")
    assert burn_in_of(mine) == burn_in_of(other)
