"""`pipeline.py run-local`: the real steps in their real processes; only the library's functions are doubles."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from softteacher.choices import Bounds

ROOT = Path(__file__).parents[1]
REQUIRED = ["--data", "s3://data/cards", "--repository", "s3://models/triton", "--triton", "http://127.0.0.1:8000"]
ARRIVALS = ["--source", "s3://data/incoming", "--state", "s3://data/state", "--base", "s3://data/splits"]
ARRIVALS += ["--registry", "s3://models/registry", *REQUIRED[2:]]

DOUBLES = """
import json, os, sys, types
from pathlib import Path

def double(path, answer, *files, out=0):
    module, name = path.rsplit(".", 1)
    def run(*arguments, **options):
        with open(os.environ["CALLS"], "a") as calls:
            print(json.dumps([name, [str(a) for a in arguments], options], default=vars), file=calls)
        print("progress of", name, file=sys.stderr)
        if name == os.environ.get("BAD_INPUT"):
            from softteacher.storage import MissingFile
            try:
                open("/nowhere")
            except OSError as error:
                raise MissingFile("/nowhere: no such file; check the path") from error
        if name == os.environ.get("BROKEN"):
            raise ZeroDivisionError("a failure of ours")
        if name == os.environ.get("STOPPED"):
            raise SystemExit(143)
        for file in files:
            folder = Path(options.get("out") or arguments[out])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(name)
        return answer
    setattr(sys.modules.setdefault(module, types.ModuleType(module)), name, run)

double("softteacher.data.fingerprint.fingerprint", "f1")
part = {"images": 3, "fingerprint": "f"}
double("softteacher.data.split.split", {"labeled": part, "unlabeled": part, "validation": part}, "labeled.json", out=1)
double("softteacher.training.launch.launch", {"teacher": {"AP": .5}}, "settings.yaml", out=3)
roc = {"fpr": [0., 1.], "tpr": [0., 1.], "threshold": [1., 0.]}
found = {"classes": ["ace", "background"], "matrix": [[3, 1], [2, 0]], "roc": roc}
scores = {"teacher": {"AP": .5}, "confusion": found}
double("softteacher.evaluation.evaluate.evaluate", scores, "report.html", "detections.json", out=2)
parity = {"ap": {"onnxruntime": .5}, "batch_1": {}, "batch_4": {}}
double("softteacher.serving.export.export", parity, "model.onnx", out=1)
decision = types.SimpleNamespace(deploy="REFUSE" not in os.environ, reason="better", metrics=lambda: {"ap": .5})
double("softteacher.serving.gate.gate", decision, "report.html")
double("softteacher.serving.deploy.deploy", {"version": 3})
double("softteacher.serving.lineage.record", {"version": 3, "run_id": "r"})
double("softteacher.serving.lineage.lineage", {})
double("softteacher.serving.lineage.table", "a table")
double("softteacher.serving.lineage.champion_model", "s3://models/registry/detector/2/model")
arrived = dict.fromkeys(["reason", "round", "new", "new_labeled", "fingerprint"], 1)
arrived["enough"] = "NOTHING" not in os.environ
double("softteacher.collecting.collect.collect", arrived, "labeled.json", out=2)
double("softteacher.collecting.collect.commit", {"round": 1})
"""


def run_local(
    folder: Path, *arguments: str, name: str = "training", **environment: str
) -> tuple[subprocess.CompletedProcess, list]:
    """The finished command, and the library's calls as [function, arguments, options]."""
    required = REQUIRED if name == "training" else ARRIVALS
    folder.joinpath("sitecustomize.py").write_text(DOUBLES)
    calls = folder / "calls.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipeline.py"), "run-local", name, *required, "--preset", "demo", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "CALLS": str(calls), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_local_run_with_baseline(tmp_path: Path):
    done, calls = run_local(
        tmp_path, "--baseline", "--set", "training.seed=7", "--gate-delta", "0.01", "--outputs", "outputs.json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    names = ["fingerprint", "split", "train", "evaluate", "export", "gate", "deploy", "report"]
    names += ["train-baseline", "evaluate-baseline"]
    assert set(outputs) == set(names)
    assert all(outputs[step]["seconds"] > 0 for step in names)
    assert Path(outputs["train"]["model"], "settings.yaml").read_text() == "launch"
    assert Path(outputs["export"]["onnx"], "model.onnx").is_file()
    assert Path(outputs["evaluate-baseline"]["results"], "detections.json").is_file()
    assert outputs["train"]["model"] != outputs["train-baseline"]["model"]
    assert outputs["evaluate"]["metrics"] == {"teacher_AP": 0.5}
    assert outputs["evaluate"]["detections"]["confusionMatrix"]["rows"] == [{"row": [3, 1]}, {"row": [2, 0]}]
    assert outputs["gate"]["Output"] is True
    assert outputs["gate"]["decision"] == {"ap": 0.5, "reason": "better"}
    assert outputs["deploy"]["facts"] == {"version": 3}

    by_name = {name: (arguments, options) for name, arguments, options in calls}
    bounds = {"bounds": asdict(Bounds(0.01, 0.05, 1.5, False)), "out": outputs["gate"]["results"]}
    assert by_name["gate"] == ([outputs["export"]["onnx"], "s3://models/triton", "detector"], bounds)
    assert Path(outputs["gate"]["report"]).read_text() == "gate"
    deployed = [outputs["export"]["onnx"], *REQUIRED[3::2], "detector"]
    runtime = {"backend": "python", "engine": "onnxruntime-fp32", "gpu": False, "tensorrt": False}
    options = {"runtime": runtime, "canary": None, "decision": outputs["gate"]["results"]}
    assert by_name["deploy"] == (deployed, options | {"run": by_name["deploy"][1]["run"]})
    assert by_name["deploy"][1]["run"].isdecimal()  # kfp.local's own
    trained = [(arguments, options) for name, arguments, options in calls if name == "launch"]
    assert ["name='soft_teacher'" in arguments[4] for arguments, _ in trained] == [True, False]
    assert all("seed=7" in arguments[4] for arguments, _ in trained)
    assert [options["processes"] for _, options in trained] == [1, 1]
    assert [options["checkpoints"] for _, options in trained] == [None, None]
    assert trained[0][0][:3] == trained[1][0][:3]

    assert done.stdout.count("progress of evaluate") == 2
    assert "KFP Executor" not in done.stdout
    assert "executor_input" not in done.stdout


def test_local_run_that_the_gate_refuses(tmp_path: Path):
    done, calls = run_local(tmp_path, REFUSE="1")
    assert done.returncode == 0
    assert {name for name, *_ in calls} == {"fingerprint", "split", "launch", "evaluate", "export", "gate"}
    made = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    assert set(made) == {"fingerprint", "split", "train", "evaluate", "export", "gate", "report"}


def test_local_run_with_a_registry(tmp_path: Path):
    done, calls = run_local(tmp_path, "--registry", "s3://models/registry", "--max-class-drop", "1")
    assert done.returncode == 0, done.stdout
    by_name = {name: (arguments, options) for name, arguments, options in calls}
    served = [name for name, *_ in calls if name not in {"evaluate", "report"}]  # evaluate runs before or after
    assert served[-4:] == ["deploy", "record", "lineage", "table"]
    assert by_name["record"][0][2:] == ["s3://models/triton", "detector", "s3://models/registry"]
    assert by_name["gate"][1]["bounds"] == asdict(Bounds(0, 1, 1.5, False))


@pytest.mark.parametrize("verdict", ["accepted", "rejected"])
def test_local_retraining(tmp_path: Path, verdict):
    options = ["--new-share", "0.4", "--canary", "0.1", "--require-significant", "--labels", "a.json", "--min-new", "7"]
    refused = {"REFUSE": "1"} if verdict == "rejected" else {}
    done, calls = run_local(tmp_path, *options, name="retraining", **refused)
    assert done.returncode == 0, done.stdout
    outputs = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    names = {"collect", "champion", "train", "evaluate", "export", "gate", f"commit-{verdict}", "report"}
    assert set(outputs) == names | ({"deploy", "record"} if verdict == "accepted" else set())
    by_name = {name: (arguments, options) for name, arguments, options in calls}
    where, options = by_name["collect"]
    assert (where[:2], options["labels"]) == (["s3://data/incoming", "s3://data/state"], ["a.json"])
    assert (options["base"], options["min_new"], options["include_rejected"]) == ("s3://data/splits", 7, False)
    settings = by_name["launch"][0][4]
    assert "init_from='s3://models/registry/detector/2/model'" in settings
    assert "new_share=0.4" in settings
    assert by_name["gate"][1]["bounds"] == asdict(Bounds(0, 0.05, 1.5, True))
    if verdict == "accepted":
        assert by_name["deploy"][1]["canary"] == 0.1
    run_id = by_name["commit"][1]["run"]
    assert by_name["commit"] == (
        ["s3://data/state", outputs["collect"]["dataset"]],
        {"accepted": not refused, "run": run_id},
    )
    assert run_id
    assert calls[-1][0] == "commit"


def test_local_retraining_with_nothing_new(tmp_path: Path):
    done, calls = run_local(tmp_path, name="retraining", NOTHING="1")
    assert done.returncode == 0, done.stdout
    assert [name for name, *_ in calls] == ["collect", "commit"]


@pytest.mark.parametrize("broken", ["evaluate", "deploy", "record"])
def test_a_retraining_that_fails_does_not_move_the_state(tmp_path: Path, broken):
    done, calls = run_local(tmp_path, name="retraining", BROKEN=broken)
    assert (done.returncode, done.stderr) == (1, f"error: step {broken} failed; its output is above\n")
    assert "commit" not in [name for name, *_ in calls]


def test_local_run_on_bad_input(tmp_path: Path):
    done, calls = run_local(tmp_path, "--baseline", BAD_INPUT="launch")
    assert done.returncode == 2
    assert done.stderr == "error: step train: /nowhere: no such file; check the path\n"
    assert "Traceback" not in done.stdout
    assert [name for name, *_ in calls] == ["fingerprint", "split", "launch"]
    done, _ = run_local(tmp_path, "--pipeline-root", "s3://data/runs")
    assert done.stderr == (
        "error: --pipeline-root s3://data/runs: the steps write to this machine; choose a local folder\n"
    )


def test_local_run_on_a_failure_of_ours(tmp_path: Path):
    done, _ = run_local(tmp_path, BROKEN="export")
    assert done.returncode == 1
    assert done.stderr == "error: step export failed; its output is above\n"
    assert done.stdout.count("Traceback") == 1
    assert "ZeroDivisionError: a failure of ours" in done.stdout


def test_a_training_that_was_stopped_is_a_step_that_failed(tmp_path: Path):
    done, calls = run_local(tmp_path, STOPPED="launch")  # as at SIGTERM: KFP tries such a step again
    assert (done.returncode, done.stderr) == (1, "error: step train failed; its output is above\n")
    assert [name for name, *_ in calls] == ["fingerprint", "split", "launch"]
