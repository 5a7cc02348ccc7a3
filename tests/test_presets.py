"""Every preset builds and takes a step of training."""

import copy

import pytest
import torch

from softteacher.config import load_settings, presets
from softteacher.data.loader import Batch, Views
from softteacher.detectors.build import build
from softteacher.methods import build_method
from softteacher.training.trainer import Trainer
from tests.samples import noise_views

FEW = ("pre_nms_train=20", "proposals_train=10", "rpn_batch=16", "roi_batch=8", "score_threshold=0", "head_channels=64")


@pytest.mark.parametrize("preset", presets())
def test_a_step(preset):
    """On 64 pixels with few proposals, the network as large as it is; the teacher believes all that it sees."""
    believe = [f"method.{key}_threshold=0" for key in ("pool", "rpn", "cls")] + ["method.reg_variance_threshold=1000"]
    overrides = [*(f"detector.{x}" for x in FEW), "detector.backbone_weights=null", *believe]
    settings = load_settings(preset, [*overrides, "training.warmup_factor=1"])
    torch.manual_seed(0)
    student = build(settings.detector, 3)
    teacher = copy.deepcopy(student).requires_grad_(False)
    method = build_method(settings, student, teacher, dict.fromkeys("abc", 1.0))
    trainer = Trainer(student, teacher, method, settings, torch.device("cpu"))
    before = {k: p.detach().clone() for k, p in student.named_parameters()}
    plain = noise_views(1)
    unlabeled = Views(plain.images, plain.sizes, plain.matrices, [], [], plain.seeds)
    numbers = trainer.step([Batch(noise_views(1, seed=1), unlabeled, unlabeled)])
    assert trainer.progress.skipped == 0
    assert numbers["pseudo_boxes_pool"] > 0
    assert {k for k, v in numbers.items() if k.startswith("unsup_") and not v > 0} == set()
    still = {k for k, p in student.named_parameters() if torch.equal(p, before[k])}
    assert still <= {f"fpn.layer_blocks.{n}.0.bias" for n in (2, 3)}  # so few RoIs and anchors may be of other levels
    follows = all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert follows == settings.method.ema_ramp  # an exact copy after the first step


@pytest.mark.parametrize("preset", ["demo", "small"])
def test_the_guard_can_work_in_a_first_run(preset):
    settings = load_settings(preset)
    assert settings.method.guard
    assert settings.burn_in_steps
    assert 0 < 2 * settings.training.evaluate_every < settings.training.iterations - settings.burn_in_steps
