"""The loop: schedule, sum of the terms, skipped steps, log. It runs with any method."""

import copy
import itertools
import json

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Batch
from softteacher.errors import UserError
from softteacher.training.trainer import learning_rate, run_training
from tests.samples import dataset, noise_views, write_coco


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-5), (250, 0.005005), (500, 0.01), (119_999, 0.01), (120_000, 1e-3), (160_000, 1e-4), (179_999, 1e-4)],
)
def test_the_papers_schedule(step, expected):
    assert learning_rate(step, load_settings("coco-10pct").training) == pytest.approx(expected)


class Fake:
    """A method of one parameter: the loss is (w - 3)^2 in two terms, or what `broken` says."""

    def __init__(self, broken=()):
        self.student = torch.nn.Module()
        self.student.w = torch.nn.Parameter(torch.zeros(()))
        self.teacher = copy.deepcopy(self.student)
        self.broken = broken
        self.seeds = []

    def losses(self, batch, step):
        self.seeds.append(torch.rand(()).item())
        loss = (self.student.w - 3) ** 2 / 2
        factor = torch.nan if step in self.broken else 1
        return {"a": loss * factor, "b": loss}, {"fact": float(step)}


def run(tmp_path, fake, *overrides, batches=None, sets=None, validate=None):
    chosen = ["training.optimizer=sgd", "training.lr=0.1", "training.momentum=0", "training.weight_decay=0"]
    chosen += ["training.warmup_iterations=0", "training.lr_steps=[]", "training.iterations=10", *overrides]
    settings = load_settings(None, chosen)
    batches = batches or itertools.repeat(Batch(noise_views()), settings.training.iterations)
    facts = run_training(
        fake.student, fake.teacher, fake, batches, settings, torch.device("cpu"), tmp_path, sets or {}, validate
    )
    return facts, [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]


def test_it_minimises_the_sum_and_the_teacher_follows(tmp_path):
    fake = Fake()
    facts, log = run(tmp_path, fake, "training.log_every=4", "method.ema_momentum=0.5")
    w, teacher = 0.0, 0.0
    for step in range(10):
        w -= 0.1 * 2 * (w - 3)
        momentum = min(0.5, 1 - 1 / (step + 1))
        teacher = momentum * teacher + (1 - momentum) * w
    assert fake.student.w.item() == pytest.approx(w, rel=1e-5)
    assert fake.teacher.w.item() == pytest.approx(teacher, rel=1e-5)
    assert [row["step"] for row in log] == [4, 8, 10]
    assert set(log[0]) == {"step", "loss", "a", "b", "fact", "lr", "images_per_second", "skipped"}
    assert [row["fact"] for row in log] == [1.5, 5.5, 8.5]  # means since the last line
    assert log[0]["loss"] == pytest.approx(log[0]["a"] + log[0]["b"], rel=1e-4)
    assert (facts["steps"], facts["skipped"], facts["unreadable"]) == (10, 0, {})
    assert any(p.name.startswith("events.out.tfevents") for p in tmp_path.iterdir())


def test_randomness_depends_on_seed_and_step(tmp_path):
    fakes = [Fake() for _ in range(3)]
    for n, (fake, seed) in enumerate(zip(fakes, (1, 1, 2), strict=True)):
        (tmp_path / str(n)).mkdir()
        torch.rand(n)
        run(tmp_path / str(n), fake, f"training.seed={seed}")
    assert fakes[0].seeds == fakes[1].seeds
    assert len(set(fakes[0].seeds + fakes[2].seeds)) == 20


def test_a_step_that_is_not_finite_is_skipped(tmp_path, capsys):
    fake, whole = Fake(broken={2, 5}), Fake()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    facts, log = run(tmp_path / "a", fake)
    run(tmp_path / "b", whole, "training.iterations=8")
    assert facts["skipped"] == log[-1]["skipped"] == 2
    assert "step 2: not finite (a); step skipped (1 so far)" in capsys.readouterr().err
    assert fake.student.w.item() == whole.student.w.item()
    assert all(value == value for row in log for value in row.values())  # no nan in the log


def test_it_gives_up_on_a_loss_that_stays_broken(tmp_path):
    with pytest.raises(UserError, match=r"20 times in a row; lower training.lr \(now 0.1\)"):
        run(tmp_path, Fake(broken=range(100)), "training.iterations=100")


def test_validation(tmp_path):
    seen = []
    _, log = run(
        tmp_path,
        Fake(),
        "training.evaluate_every=4",
        validate=lambda step: seen.append(step) or {"teacher_AP": step / 8},
    )
    assert seen == [3, 7]
    assert [(row["step"], row.get("teacher_AP")) for row in log] == [(4, 0.375), (8, 0.875), (10, None)]


@pytest.mark.parametrize(("bad", "survives"), [(["x: broken"], True), (["x: broken", "y: broken"], False)])
def test_broken_images(tmp_path, capsys, bad, survives):
    data = dataset(write_coco(tmp_path / "set"))
    plain = Batch(noise_views())
    batches = [plain, *(Batch(plain.labeled, broken={"labeled": [line]}) for line in (*bad, *bad)), plain]
    if survives:
        facts, _ = run(tmp_path, Fake(), "training.iterations=4", batches=iter(batches), sets={"labeled": data})
        assert facts["unreadable"] == {"labeled": bad}
        assert capsys.readouterr().err.count("x: broken") == 1
    else:
        with pytest.raises(UserError, match="2 of 8 images are missing or broken, 1 allowed; first: x: broken"):
            run(tmp_path, Fake(), batches=iter(batches), sets={"labeled": data})
