"""The loop: schedule, sum of the terms, skipped steps, log. It runs with any method."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Batch
from softteacher.detectors.build import build
from softteacher.errors import UserError
from softteacher.methods import build_method
from softteacher.methods.base import Method
from softteacher.training.trainer import Trainer, learning_rate, run_training
from tests.samples import TINY, dataset, noise_views, write_coco


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-5), (250, 0.005005), (500, 0.01), (119_999, 0.01), (120_000, 1e-3), (160_000, 1e-4), (179_999, 1e-4)],
)
def test_the_papers_schedule(step, expected):
    assert learning_rate(step, load_settings("coco-10pct").training) == pytest.approx(expected)


class Fake(Method):
    """A method of one parameter: the loss is (w - 3)^2 in two terms, or what `broken` says."""

    def __init__(self, broken=()):
        self.student = torch.nn.Module()
        self.student.w = torch.nn.Parameter(torch.zeros(()))
        self.student.precision = torch.float32
        self.teacher = copy.deepcopy(self.student)
        self.broken, self.trust, self.seen, self.asked = broken, 1.0, None, 0

    def losses(self, batch):
        loss = (self.student.w - 3) ** 2 / 2
        factor = torch.nan if self.asked in self.broken else 1
        self.asked += 1
        return {"a": loss * factor, "b": loss}, {"fact": self.asked - 1.0}


def run(tmp_path, fake, *overrides, batches=None, sets=None, validate=None):
    chosen = ["training.optimizer=sgd", "training.lr=0.1", "training.momentum=0", "training.weight_decay=0"]
    chosen += ["training.warmup_iterations=0", "training.lr_steps=[]", "training.iterations=10", *overrides]
    settings = load_settings(None, chosen)
    batches = batches or itertools.repeat(Batch(noise_views()), settings.training.iterations)
    trainer = Trainer(fake.student, fake.teacher, fake, settings, torch.device("cpu"))
    run_training(trainer, iter(batches), sets or {}, tmp_path, None, validate)
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    return trainer.progress.facts(), [json.loads(line) for line in lines]


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


def test_the_backbone_has_a_learning_rate_of_its_own():
    student = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    student["backbone"].bias.requires_grad_(False)
    student.precision = torch.float32
    fake = Fake()
    fake.losses = lambda batch: ({"a": sum(p.sum() for p in student.parameters())}, {})
    chosen = ["training.lr=0.1", "training.backbone_lr=0.25", "training.warmup_iterations=0", "training.momentum=0"]
    settings = load_settings(None, [*chosen, "training.weight_decay=0"])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    Trainer(student, copy.deepcopy(student), fake, settings, torch.device("cpu")).step([Batch(noise_views())])
    moved = {k: (before[k] - v).item() for k, v in student.state_dict().items()}
    expected = {"backbone.weight": 0.025, "backbone.bias": 0, "head.weight": 0.1, "head.bias": 0.1}
    assert moved == pytest.approx(expected, abs=1e-6)


def linear(*overrides):
    """A trainer whose loss has the gradient (3, 4), of length 5, in a weight that starts at (1, 1)."""
    student = torch.nn.Module()
    student.w, student.precision = torch.nn.Parameter(torch.ones(2)), torch.float32
    fake = Fake()
    fake.losses = lambda batch: ({"a": (student.w * torch.tensor([3.0, 4.0])).sum()}, {})
    usual = ["training.lr=0.1", "training.warmup_iterations=0", "training.momentum=0", "training.weight_decay=0"]
    settings = load_settings(None, [*usual, *overrides])
    return Trainer(student, copy.deepcopy(student), fake, settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [0.4, 0.2]),
        (["training.clip_gradient=1"], [0.88, 0.84]),  # each gradient is (0.6, 0.8)
        (["training.clip_gradient=10"], [0.4, 0.2]),
        (["training.momentum=0.5"], [1 - 0.3 * 2.5, 1 - 0.4 * 2.5]),
        # w <- w - 0.1 * (gradient + 2 w), twice
        (["training.weight_decay=2"], [0.5 - 0.3 - 0.1, 0.4 - 0.4 - 0.08]),
    ],
)
def test_two_steps_of_sgd(overrides, expected):
    trainer = linear("training.optimizer=sgd", *overrides)
    for _ in range(2):
        trainer.step([Batch(noise_views())])
    assert trainer.student.w.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_step_of_adamw():
    """The first step of Adam is `lr` long in each weight; the decay of AdamW comes off the weight itself."""
    trainer = linear("training.optimizer=adamw", "training.weight_decay=2")
    trainer.step([Batch(noise_views())])
    assert trainer.student.w.tolist() == pytest.approx([1 - 0.1 * 2 - 0.1] * 2, abs=1e-5)


def test_norms_and_position_biases_of_a_transformer_do_not_decay():
    chosen = ["training.optimizer=adamw", "training.weight_decay=0.1", "training.backbone_lr=0.5"]
    settings = load_settings(None, chosen)
    student = torch.nn.Module()
    student.backbone = torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(2), "linear": torch.nn.Linear(2, 2)})
    student.backbone.relative_position_bias_table = torch.nn.Parameter(torch.zeros(3))
    student.head, student.precision = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2)}), torch.float32
    trainer = Trainer(student, copy.deepcopy(student), Fake(), settings, torch.device("cpu"))
    names = {id(p): name for name, p in student.named_parameters()}
    groups = {
        tuple(sorted(names[id(p)] for p in g["params"])): (g["weight_decay"], g["scale"])
        for g in trainer.optimizer.param_groups
    }
    assert groups == {
        ("head.norm.bias", "head.norm.weight"): (0.1, 1.0),
        ("backbone.linear.bias", "backbone.linear.weight"): (0.1, 0.5),
        ("backbone.norm1.bias", "backbone.norm1.weight", "backbone.relative_position_bias_table"): (0.0, 0.5),
    }


@pytest.mark.parametrize(("unlabeled", "expected"), [(False, 4), (True, 10)])
def test_images_are_those_that_the_student_learns_from(unlabeled, expected):
    trainer = linear()
    strong = noise_views(3) if unlabeled else None
    trainer.step([Batch(noise_views(2), strong, strong)] * 2)
    assert trainer.progress.images == expected


def test_cosine():
    s = load_settings(None, ["training.lr_schedule=cosine", "training.iterations=100", "training.warmup_iterations=0"])
    rates = [learning_rate(step, s.training) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.01, 0.005, 0])


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path):
    """Two batches a step: the loss is that of the weights before it, twice."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Fake(), Fake()
    run(tmp_path / "one", one)
    batches = itertools.repeat(Batch(noise_views()), 20)
    _, log = run(tmp_path / "two", two, "training.accumulate=2", batches=batches)
    assert two.student.w.item() == pytest.approx(one.student.w.item(), rel=1e-6)
    assert log[-1]["fact"] == 9.5


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


def validator(scores):
    """Answers these teacher APs, one a validation."""
    answers = iter(scores)
    return lambda: {"teacher": {"AP": next(answers)}, "student": {"AP": 0.5}}


def test_validation(tmp_path):
    facts, log = run(tmp_path, Fake(), "training.evaluate_every=4", validate=validator([0.1, 0.3, 0.2]))
    rows = [(row["step"], row["teacher_AP"], row["student_AP"]) for row in log if "teacher_AP" in row]
    assert rows == [(4, 0.1, 0.5), (8, 0.3, 0.5), (10, 0.2, 0.5)]
    assert facts["best_step"] == 8
    assert 0 < facts["evaluation_share"] < 1


def test_the_best_weights_are_kept(tmp_path):
    fake = Fake()
    settings = load_settings(None, ["training.iterations=4", "training.evaluate_every=1", "training.lr=0.1"])
    trainer = Trainer(fake.student, fake.teacher, fake, settings, torch.device("cpu"))
    seen = []

    def validate():
        seen.append(fake.teacher.w.item())
        return {"teacher": {"AP": [0.2, 0.4, 0.4, 0.1][len(seen) - 1]}, "student": {"AP": 0.0}}

    run_training(trainer, itertools.repeat(Batch(noise_views())), {}, tmp_path, None, validate)
    assert trainer.progress.best["step"] == 2
    assert trainer.progress.best["teacher"]["w"].item() == seen[1]


@pytest.mark.parametrize(("patience", "stops_at"), [(1, 6), (2, 8), (0, 10)])
def test_early_stop(tmp_path, capsys, patience, stops_at):
    chosen = ["training.evaluate_every=2", f"training.patience={patience}"]
    facts, _ = run(tmp_path, Fake(), *chosen, validate=validator([0.1, 0.3, 0.3, 0.2, 0.1]))
    assert facts["steps"] == stops_at
    assert facts["best_step"] == 4
    assert ("stopped early" in capsys.readouterr().err) == (patience > 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, error):
    fake = Fake()
    monkeypatch.setattr(fake, "losses", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"step 0: .*lower .*data.short_side"):
        run(tmp_path, fake)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(fake, "losses", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, fake)


def test_fp16_scales_the_loss(tmp_path):
    """The scaler is in the state, and a step with it lands where one without it lands."""
    plain, scaled = Fake(), Fake()
    scaled.student.precision = torch.float16
    for name, fake in (("plain", plain), ("scaled", scaled)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, fake)
    assert scaled.student.w.item() == pytest.approx(plain.student.w.item(), rel=1e-6)
    trainer = Trainer(scaled.student, scaled.teacher, scaled, load_settings(), torch.device("cpu"))
    assert trainer.state()["scaler"]["scale"] > 1


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


@pytest.mark.parametrize("name", ["supervised", "mean_teacher", "stac", "soft_teacher"])
@pytest.mark.parametrize("trust", [1.0, 0.0])
def test_backward_in_two_parts_gives_the_same_gradient(name, trust):
    """Of accumulated batches, too; the guard may have left the pseudo labels out."""
    low = [f"method.{key}_threshold=0" for key in ("pool", "rpn", "cls")]
    chosen = [*TINY, *low, f"method.name={name}", "detector.score_threshold=0", "method.reg_variance_threshold=9"]
    plain = replace(noise_views(), boxes=[], labels=[])
    unlabeled = (None, None) if name == "supervised" else (plain, noise_views() if name == "stac" else plain)
    found = []
    for separate in (False, True):
        torch.manual_seed(0)
        settings = load_settings("demo", [*chosen, f"training.separate_backward={separate}"])
        student = build(settings.detector, 3)
        teacher = copy.deepcopy(student)
        method = build_method(settings, student, teacher, dict.fromkeys("abc", 1.0))
        method.trust = trust
        trainer = Trainer(student, teacher, method, settings, torch.device("cpu"))
        numbers = trainer.step([Batch(noise_views(seed=n), *unlabeled) for n in (1, 2)])
        found.append((numbers, trainer.progress.images, [p.grad for p in student.parameters()]))
    (whole, images, gradients), (parts, again, others) = found
    assert images == again
    assert whole.keys() == parts.keys()
    assert ("unsup_over_sup" in whole) == (name != "supervised" and trust > 0)
    for key, value in whole.items():
        torch.testing.assert_close(torch.as_tensor(parts[key]), torch.as_tensor(value), msg=key)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
