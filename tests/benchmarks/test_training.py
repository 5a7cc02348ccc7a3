"""`benchmarks/training.py` before it measures."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_script_of_the_reference_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("SOFTTEACHER_SHARED", str(tmp_path))
    training = importlib.import_module("training")
    for name in ("training", "common"):
        sys.modules.pop(name)
    monkeypatch.setattr(sys, "argv", ["training.py", "--reference", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert f"{tmp_path}/tools/reference_speed/bench_mmdet.py: no such file; let SOFTTEACHER" in capsys.readouterr().err
