"""The teacher is an exponential moving average of the student."""

import copy

import pytest
import torch

from softteacher.training.ema import ema_momentum, update_teacher


@pytest.mark.parametrize(
    ("step", "momentum", "expected"),
    [
        (0, 0.999, 0),
        (1, 0.999, 0.5),
        (9, 0.999, 0.9),
        (998, 0.999, 998 / 999),
        (999, 0.999, 0.999),
        (10**6, 0.999, 0.999),
        (9, 0.5, 0.5),
        (3, 0, 0),
    ],
)
def test_momentum(step, momentum, expected):
    assert ema_momentum(step, momentum) == pytest.approx(expected)


def nets():
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    teacher = copy.deepcopy(student).requires_grad_(False)
    for p in student.parameters():
        p.data.normal_()
    student[1].running_mean.fill_(7)
    return teacher, student


def test_step_0_is_an_exact_copy():
    teacher, student = nets()
    update_teacher(teacher, student, ema_momentum(0, 0.999))
    for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.999])
def test_update(momentum):
    teacher, student = nets()
    expected = [
        momentum * t + (1 - momentum) * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = copy.deepcopy(student.state_dict())
    update_teacher(teacher, student, momentum)
    for a, b in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert teacher[1].running_mean.tolist() == [0, 0]  # parameters only
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
