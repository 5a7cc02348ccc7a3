"""The numbers of a line of the log: means over steps and processes of what is known, and no number for what is not."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from softteacher.training.log import window_means
from tests.training.test_trainer import Fake, run

CPU = torch.device("cpu")


def test_what_is_not_known_is_left_out() -> None:
    nan = torch.tensor(math.nan)
    window = {"loss": [torch.tensor(1.0), nan, 4.0], "precision": [math.nan, math.nan], "a": [nan, math.inf], "b": [0]}
    assert window_means(window, CPU) == {"loss": 2.5, "b": 0.0}


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    windows = [
        {"loss": [1.0, 2.0], "precision": [math.nan, math.nan], "recall": [math.nan, math.nan]},
        {"loss": [torch.tensor(6.0), torch.tensor(math.nan)], "precision": [0.8, math.nan], "recall": [math.nan] * 2},
    ]
    means = window_means(windows[rank], CPU)
    assert means == pytest.approx({"loss": 3.0, "precision": 0.8}), means
    dist.destroy_process_group()


def test_a_process_without_a_value_has_no_say(tmp_path: Path) -> None:
    spawn(one_of_two, (str(tmp_path),), nprocs=2)


def test_a_window_without_a_finite_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its line lacks what is not known, the bar says so, and training goes on."""
    facts, log = run(tmp_path, Fake(broken={4, 5, 8, 9}), "training.log_every=2")
    assert (facts["steps"], facts["skipped"]) == (10, 4)
    assert [row["step"] for row in log if "loss" not in row] == [6, 10]
    assert "a" not in log[2]
    assert log[2]["b"] > 0
    assert "loss not finite" in capsys.readouterr().err
