"""What `benchmarks/common.py` says of the machine in every result."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPUINFO = """\
processor\t: 0
model name\t: Some Processor @ 2.50GHz
flags\t\t: fpu avx avx2 avx512f avx512bw avx512_bf16

processor\t: 1
model name\t: Some Processor @ 2.50GHz
flags\t\t: fpu avx avx2 avx512f avx512bw avx512_bf16
"""


@pytest.fixture
def common() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("common")
        sys.modules.pop("common")


def test_a_result_has_the_features_that_make_a_processor_fast(common: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = common.machine(tmp_path / "cpuinfo")["machine"]
    assert found["processor"] == "Some Processor @ 2.50GHz"
    assert found["features"] == ["avx2", "avx512f", "avx512_bf16"]
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")  # ARM
    assert "features" not in common.machine(tmp_path / "cpuinfo")["machine"]
    assert "features" not in common.machine(tmp_path / "nowhere")["machine"]
