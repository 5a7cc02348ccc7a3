"""Commit of the code, and whether the package was changed since."""

import subprocess
from pathlib import Path

import pytest
import torch

from softteacher.training.provenance import git_sha, surroundings


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package and results beside it, from which the code seems to run."""
    for name in ("softteacher/training/provenance.py", "results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    commit = ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"]
    for command in (["init", "-q"], ["add", "."], commit):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(
        "softteacher.training.provenance.__file__", str(tmp_path / "softteacher/training/provenance.py")
    )
    monkeypatch.delenv("SOFTTEACHER_GIT_SHA", raising=False)
    return tmp_path


def test_results_beside_the_package_are_no_change_of_it(checkout: Path) -> None:
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (checkout / "results" / "a.json").write_text("2")
    assert git_sha() == head.strip()
    (checkout / "softteacher" / "new.py").write_text("")
    assert git_sha() == f"{head.strip()}-dirty"


def test_no_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").rename(checkout / "gone")
    assert git_sha() is None
    monkeypatch.setenv("SOFTTEACHER_GIT_SHA", "abc")
    assert surroundings(torch.device("cpu"), torch.bfloat16)["git_sha"] == "abc"
