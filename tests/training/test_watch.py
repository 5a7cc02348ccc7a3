"""The guard lowers the weight of pseudo labels where they do harm; warnings are given once, in plain words."""

import copy
import itertools

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Batch
from softteacher.methods.base import Method
from softteacher.training.trainer import Trainer, run_training
from softteacher.training.watch import guard, warn
from tests.samples import noise_views


class Fake(Method):
    def __init__(self, frequency=(1.0, 1.0)):
        self.student = torch.nn.Linear(1, 1)
        self.student.precision = torch.float32
        self.teacher = copy.deepcopy(self.student)
        self.trust, self.seen, self.frequency = 1.0, torch.tensor([5.0, 0.0]), torch.tensor(frequency)
        self.classes = ["cat", "dog"]


def trainer(*overrides):
    fake = Fake()
    settings = load_settings(None, ["training.iterations=1000", "method.burn_in=0.2", *overrides])
    made = Trainer(fake.student, fake.teacher, fake, settings, torch.device("cpu"))
    made.progress.best = {
        "step": 200,
        "teacher": {k: torch.full_like(v, 7) for k, v in fake.teacher.state_dict().items()},
        "student": {k: torch.full_like(v, 5) for k, v in fake.student.state_dict().items()},
    }
    return made


def validations(made, *scores):
    for step, ap in scores:
        made.progress.step = step
        guard(made, ap)


def test_harm_halves_the_trust_and_goes_back(capsys):
    made = trainer()
    made.student(torch.ones(1, 1)).sum().backward()
    made.optimizer.step()
    validations(made, (100, 0.2), (200, 0.4))
    assert made.optimizer.state
    validations(made, (300, 0.3))
    assert made.method.trust == 0.5
    assert not made.optimizer.state  # no momentum of the way that did harm
    assert (made.teacher.weight, made.student.weight) == (7, 5)
    assert "step 300: pseudo labels do harm: the teacher's AP is 0.300, 0.400 before them" in capsys.readouterr().err
    validations(made, (400, 0.1))
    assert made.method.trust == 0.25
    validations(made, (500, 0.1))
    assert made.method.trust == 0
    assert "they are left out now" in capsys.readouterr().err
    validations(made, (600, 0.1))  # it is supervised training now, which does no harm
    assert made.progress.facts()["guard_stepped_in"] == 3


@pytest.mark.parametrize(
    ("overrides", "scores"),
    [
        ([], [(200, 0.4), (300, 0.37), (400, 0.5)]),  # within what a small validation set says at random
        (["method.guard=false"], [(200, 0.4), (300, 0.1)]),
        (["method.burn_in=0"], [(200, 0.4), (300, 0.1)]),  # nothing to compare with
    ],
)
def test_it_keeps_out(overrides, scores):
    made = trainer(*overrides)
    before = made.teacher.weight.item()
    validations(made, *scores)
    assert made.method.trust == 1
    assert made.teacher.weight.item() == before


@pytest.mark.parametrize(
    ("step", "line", "said"),
    [
        (400, {"pseudo_boxes_cls": 0.0, "pseudo_boxes_pool": 0.0}, ["the teacher finds nothing"]),
        (
            400,
            {"pseudo_boxes_cls": 0.5, "pseudo_boxes_pool": 0.9},
            ["0.50 pseudo boxes an image where", "2.00"],
        ),
        (400, {"pseudo_boxes_cls": 1.5, "pseudo_boxes_pool": 2.0}, []),
        (250, {"pseudo_boxes_cls": 0.0, "pseudo_boxes_pool": 0.0}, []),  # it has hardly begun
        (600, {"pseudo_boxes_cls": 1.5, "pseudo_boxes_pool": 2.0}, ["never a pseudo box of dog:"]),
        (600, {"loss": 1.0}, []),  # supervised
    ],
)
@pytest.mark.parametrize("threshold", ["fixed", "adaptive"])
def test_warnings(capsys, threshold, step, line, said):
    made = trainer(f"method.threshold={threshold}")
    made.progress.step = step
    for _ in range(2):
        warn(made, line)
    text = capsys.readouterr().err.replace("\n", " ")
    assert len(made.progress.said) == (1 if said else 0)
    assert text.count(f"step {step}: ") == (1 if said else 0)  # once each
    assert all(part in text for part in said)
    assert "method.threshold=adaptive" not in text or threshold == "fixed"  # no advice to do what is done


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["method.cls_threshold=0.4"], "method.threshold=adaptive, or lower method.pool_threshold"),
        (["method.threshold=fixed"], "method.threshold=adaptive, or lower method.cls_threshold"),
        (["method.name=stac", "method.threshold=adaptive"], "background; lower method.cls_threshold"),
    ],
)
def test_the_advice_is_a_setting_that_has_an_effect(capsys, overrides, advice):
    made = trainer(*overrides)
    made.progress.step = 400
    warn(made, {"pseudo_boxes_cls": 0.5})
    assert advice in " ".join(capsys.readouterr().err.split())


def test_patience_is_for_pseudo_labels(tmp_path, capsys):
    """Neither burn-in uses it up, nor what the guard goes back from."""
    scores = {10: 0.4, 70: 0.2, 80: 0.2}  # else no better and no harm
    chosen = ["training.iterations=120", "method.burn_in=0.5", "training.evaluate_every=10", "training.patience=3"]

    class Constant(Fake):
        def losses(self, batch):
            return {"a": self.student.weight.sum()}, {}

    fake = Constant()
    made = Trainer(fake.student, fake.teacher, fake, load_settings(None, chosen), torch.device("cpu"))
    validate = lambda: {"teacher": {"AP": scores.get(made.progress.step, 0.39)}}  # noqa: E731
    sets = {"labeled": None, "unlabeled": None}
    run_training(made, itertools.repeat(Batch(noise_views())), sets, tmp_path, None, validate)
    text = " ".join(capsys.readouterr().err.split())
    assert "step 80: pseudo labels do harm" in text
    assert fake.trust == 0.25
    assert "step 110: 3 validations without a better teacher: stopped early" in text
    assert made.progress.step == 110


def test_the_trainer_asks_both(tmp_path, capsys):
    """The reference is the end of burn-in, which is no validation of its own; the end is another."""

    class Poor(Fake):
        def losses(self, batch):
            return {"a": self.student.weight.sum()}, {"pseudo_boxes_cls": 0.1, "pseudo_boxes_pool": 1.0}

    fake, asked = Poor(), []
    chosen = ["training.iterations=300", "method.burn_in=0.3", "training.evaluate_every=200", "training.log_every=50"]
    made = Trainer(fake.student, fake.teacher, fake, load_settings(None, chosen), torch.device("cpu"))

    def validate():
        asked.append(made.progress.step)
        return {"teacher": {"AP": 0.4 if made.progress.step == 90 else 0.2}}

    run_training(made, itertools.repeat(Batch(noise_views())), {}, tmp_path, None, validate)
    assert asked == [90, 200, 300]
    assert fake.trust == 0.25
    text = " ".join(capsys.readouterr().err.split())
    assert "step 200: pseudo labels do harm: the teacher's AP is 0.200, 0.400 before them" in text
    assert "step 200: 0.10 pseudo boxes an image where labelled images have 2.00" in text
