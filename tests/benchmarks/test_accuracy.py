"""The table of `benchmarks/accuracy.py`: means, the share of the gap, and what it says of runs that compare badly."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from softteacher.config import Settings, load_settings
from softteacher.errors import UserError
from tests.samples import TINY, coco_tree, write_coco

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("accuracy")
        for name in ("accuracy", "common"):
            sys.modules.pop(name)


def write(folder: Path, method: str, fold: int, ap: float, first: float = 0.1, best: int = 8) -> None:
    run = {
        "dataset": "mine",
        "percent": 10,
        "method": method,
        "fold": fold,
        "ap": ap,
        "ap50": 2 * ap,
        "student_ap": ap,
        "precision": "float32",
    }
    run |= {"machine": {"processor": "P"}, "curve": [[2, first], [best, ap]]}
    run["training"] = {"steps": 10, "best_step": best}
    (folder / "accuracy").mkdir(exist_ok=True)
    (folder / "accuracy" / f"mine-10-{method}-{fold}.json").write_text(json.dumps(run))


def test_summary_and_table(accuracy: ModuleType, tmp_path: Path) -> None:
    for fold, ap in ((1, 0.2), (2, 0.3)):
        write(tmp_path, "supervised", fold, ap, first=fold / 100)
        write(tmp_path, "soft_teacher", fold, ap + 0.1, first=fold / 100)
    write(tmp_path, "supervised_full", 1, 0.65, best=10)
    write(tmp_path, "mean_teacher", 2, 0.4, first=0.07)
    summary = accuracy.summarize("mine", 10, tmp_path)
    assert summary["gap_closed"] == pytest.approx(0.1 / 0.4)
    assert summary["methods"]["mean_teacher"]["gap_closed"] is None  # began with a better burn-in, or a worse one
    write(tmp_path, "mean_teacher", 1, 0.23, first=1 / 100)
    mean_teacher = accuracy.summarize("mine", 10, tmp_path)["methods"]["mean_teacher"]
    assert mean_teacher["gap_closed"] == pytest.approx(0.03 / 0.45)  # of the fold that can be compared
    assert summary["methods"]["supervised"]["ap_std"] == pytest.approx(0.1 / 2**0.5)
    lines = accuracy.table(summary).splitlines()
    assert "| method | AP | of fold 1, 2 | student's AP | AP50 | gap closed |" in lines
    assert "| supervised | 0.250 ± 0.071 | 0.200, 0.300 | 0.250 | 0.500 |  |" in lines
    assert "| supervised_full† | 0.650 | 0.650, - | 0.650 | 1.300 |  |" in lines
    assert "| mean_teacher* | 0.400 | -, 0.400 | 0.400 | 0.800 |  |" in lines
    assert "| soft_teacher | 0.350 ± 0.071 | 0.300, 0.400 | 0.350 | 0.700 | 25% |" in lines
    assert [line[0] for line in lines if line[:1] in {"*", "†"}] == ["*", "†"]


def test_all_labels_are_the_same_at_any_percentage(accuracy: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "supervised_full", 1, 0.65)
    for method, ap in (("supervised", 0.1), ("soft_teacher", 0.2)):
        write(tmp_path, method, 1, ap)
        run = json.loads((tmp_path / "accuracy" / f"mine-10-{method}-1.json").read_text())
        (tmp_path / "accuracy" / f"mine-5-{method}-1.json").write_text(json.dumps(run | {"percent": 5, "ap": ap / 2}))
    summary = accuracy.summarize("mine", 5, tmp_path)
    assert summary["methods"]["supervised"]["ap_mean"] == pytest.approx(0.05)
    assert summary["gap_closed"] == pytest.approx(0.05 / 0.6)


def test_all_labels_of_another_percentage_are_not_trained_again(
    accuracy: ModuleType, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a result of a data set whose name begins with this one's taken for it, or complained of."""
    results = tmp_path / "results"
    results.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "one_run", lambda *_: None)
        call()
    data = json.loads((tmp_path / "work" / "mine-20-1" / "source.json").read_text())
    settings = accuracy.what_decides(load_settings("small", ["method.name=supervised", "training.seed=1"]))
    write(results, "supervised_full", 1, 0.6)
    mine = results / "accuracy" / "mine-10-supervised_full-1.json"
    run = json.loads(mine.read_text()) | {"data": data, "settings": settings}
    other = results / "accuracy" / "mine-1-10-supervised_full-1.json"
    other.write_text(json.dumps(run | {"dataset": "mine-1", "data": {}}))
    mine.write_text(json.dumps(run))
    monkeypatch.setattr(accuracy.subprocess, "run", None)  # nothing is trained
    call("--methods", "supervised_full")


def test_no_gap_to_close(accuracy: ModuleType, tmp_path: Path) -> None:
    """All labels may be no better: of a quick run all APs are 0. And there may be nothing to compare with."""
    write(tmp_path, "soft_teacher", 1, 0.0)
    assert accuracy.summarize("mine", 10, tmp_path)["gap_closed"] is None
    write(tmp_path, "supervised", 1, 0.0)
    write(tmp_path, "supervised_full", 1, 0.0)
    summary = accuracy.summarize("mine", 10, tmp_path)
    assert summary["gap_closed"] is None
    assert "| soft_teacher | 0.000 | 0.000 | 0.000 | 0.000 |  |" in accuracy.table(summary)
    write(tmp_path, "soft_teacher", 2, 0.1)  # a fold without a supervised run
    assert accuracy.summarize("mine", 10, tmp_path)["methods"]["soft_teacher"]["ap_mean"] == pytest.approx(0.05)


def test_what_decides(accuracy: ModuleType) -> None:
    """Settings of the machine, and where files lie, make no other run."""
    plain = accuracy.what_decides(load_settings("small", ["method.name=stac"]))
    machine = ["training.threads=1", "data.workers=0", "method.label_model=/a/model", "method.burn_in_cache=/b"]
    assert accuracy.what_decides(load_settings("small", ["method.name=stac", *machine])) == plain
    assert accuracy.what_decides(load_settings("small", ["method.name=stac", "training.lr=0.1"])) != plain


def test_switches_take_back_what_the_preset_adds(accuracy: ModuleType) -> None:
    small, paper = load_settings("small").method, load_settings("small", accuracy.PAPER).method
    for changes in accuracy.SWITCHES.values():
        assert load_settings("small", changes).method != small
    kept = {key: getattr(small, key) for key in ("burn_in", "ema_momentum", "adaptive_share")}
    assert paper == Settings().method.model_copy(update=kept)


def test_a_data_set_whose_name_begins_with_this_one(accuracy: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "supervised", 1, 0.2)
    run = json.loads((tmp_path / "accuracy" / "mine-10-supervised-1.json").read_text()) | {
        "dataset": "mine-10",
        "ap": 0.9,
    }
    (tmp_path / "accuracy" / "mine-10-5-supervised-1.json").write_text(json.dumps(run | {"percent": 5}))
    assert accuracy.summarize("mine", 10, tmp_path)["methods"]["supervised"]["ap_mean"] == 0.2


@pytest.fixture
def call(accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command on a small data set, into a folder of its own."""
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    data = write_coco(tmp_path / "set", coco_tree(20))

    def run(*arguments: str) -> None:
        command = ["accuracy.py", "--name", "mine", "--data", str(data), "--percent", "20", "--folds", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path / "work"), *arguments])
        accuracy.main()

    return run


def test_a_run_that_fails_leaves_the_others_alone(
    accuracy: ModuleType, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_run(a: argparse.Namespace, method: str, fold: int, results: Path) -> None:
        if method == "stac":
            raise UserError("stac found nothing")
        (results / "accuracy").mkdir(parents=True, exist_ok=True)
        write(results, method, fold, 0.5)
        file = results / "accuracy" / f"mine-10-{method}-{fold}.json"
        (results / "accuracy" / f"mine-20-{method}-{fold}.json").write_text(
            json.dumps(json.loads(file.read_text()) | {"percent": 20})
        )

    monkeypatch.setattr(accuracy, "one_run", one_run)
    with pytest.raises(SystemExit, match="stac found nothing"):
        call("--methods", "supervised", "stac")
    summary = json.loads((tmp_path / "results" / "accuracy-mine-20.json").read_text())
    assert list(summary["methods"]) == ["supervised"]


def test_a_fold_without_a_box_leaves_the_others_alone(
    accuracy: ModuleType, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = coco_tree(20)
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] % 2]
    write_coco(tmp_path / "set", tree)
    ran = []
    monkeypatch.setattr(accuracy, "one_run", lambda a, method, fold, results: ran.append(fold))
    with pytest.raises(SystemExit, match=r"(?s)fold \d+: .* 1 labelled images without one box"):
        call("--percent", "5", "--folds", "6", "--methods", "supervised")
    assert 0 < len(ran) < 6


def test_a_data_set_that_is_not_like_others(accuracy: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """All of it once: ids and folders of another order, crowds, images without boxes, one class, no val json."""
    tree = coco_tree(30, classes=["scratch"])
    for image in tree["images"]:
        image["file_name"] = f"of day {image['id'] % 3}/{image['file_name']}"
    tree["annotations"] = [row | {"iscrowd": int(row["id"] % 7 == 0)} for row in tree["annotations"][4:]]
    for row in [*tree["categories"], *tree["annotations"]]:
        row["id"] = 10**6 - 3 * row["id"]
    for row in tree["annotations"]:
        row["category_id"] = 10**6 - 3
    data = write_coco(tmp_path / "set", tree)
    (data / "annotations" / "instances_val.json").unlink()
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--name", "set #1: day", "--data", str(data)]
    command += ["--work", str(tmp_path / "work"), "--folds", "1", "--quick", "--percent", "20", "--preset", "demo"]
    for setting in TINY:
        command += ["--set", setting]
    done = subprocess.run(
        [*command, "--methods", "supervised", "supervised_full", "soft_teacher", "stac", "mean_teacher-oracle"]
    )
    told = capfd.readouterr()
    assert not done.returncode, told
    assert "a fifth of its images validates" in told.out
    summary = json.loads((tmp_path / "work" / "quick" / "accuracy-set #1: day-20.json").read_text())
    runs = {name: m["runs"] for name, m in summary["methods"].items()}
    assert list(runs) == ["supervised", "supervised_full", "stac", "soft_teacher", "mean_teacher-oracle"]
    assert all(run["same_start"] for (run,) in runs.values())


def test_other_data_under_the_same_name_is_refused(
    accuracy: ModuleType, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "one_run", lambda *_: None)
    call()
    full = json.loads((tmp_path / "work" / "mine-20-1" / "full.json").read_text())
    assert len(full["images"]) == 20
    call()
    with pytest.raises(UserError, match="mine-20-1: is a split of other data"):
        call("--validation-fraction", "0.2")
    call("--quick", "--validation-fraction", "0.2")  # has splits of its own
    write_coco(tmp_path / "set", coco_tree(19))
    with pytest.raises(UserError, match="mine-20-1: is a split of other data"):
        call()


def test_results_are_of_their_data_and_settings(
    accuracy: ModuleType, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that is there stands for the run only where both are the same."""
    settings = accuracy.what_decides(load_settings("small", ["method.name=supervised", "training.seed=1"]))
    write(tmp_path, "supervised", 1, 0.2)
    run = json.loads((tmp_path / "accuracy" / "mine-10-supervised-1.json").read_text()) | {"percent": 20}
    file = tmp_path / "results" / "accuracy" / "mine-20-supervised-1.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(accuracy.subprocess, "run", None)  # nothing is trained
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "one_run", lambda *_: None)
        call()
    data = json.loads((tmp_path / "work" / "mine-20-1" / "source.json").read_text())
    other = settings | {"training": settings["training"] | {"lr": 5}}
    for found, complaint in (
        ({}, ""),
        ({"data": {"train": "0"}}, "other data"),
        ({"settings": other}, "other settings"),
    ):
        file.write_text(json.dumps(run | {"settings": settings, "data": data} | found))
        with pytest.raises(SystemExit, match=complaint) if complaint else nullcontext():
            call("--methods", "supervised")
