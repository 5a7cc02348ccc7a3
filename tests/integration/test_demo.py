"""The main job as a user runs it: one command, real servers, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softteacher.data.coco import load_coco
from softteacher.data.split import split
from softteacher.demo.digits import make_digits
from tests.samples import write_coco

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SeaweedFS and Triton come as wheels for Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, train=40, val=8)
    return folder


def start(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "from softteacher.cli import main; main()", "demo", "--out", str(out), *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(out: Path) -> list[str]:
    """Command lines of processes that have to do with a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(out) in line and int(process.name) != os.getpid():
            found.append(line)
    return found


def test_demo_serves_what_it_trained_and_stops_everything(data, tmp_path):
    settings = ["--set", "training.iterations=6", "--set", "data.workers=0"]
    options = ["--preset", "demo", "--percent", "30", "--validation-fraction", "0.2"]
    run = start(tmp_path, "--data", str(data), *options, *settings)
    output = run.communicate(timeout=500)[0]
    assert run.returncode == 0, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["ap"]) == {"supervised", "student", "teacher"}
    assert summary["deployed"]
    for place in ("report", "model", "onnx", "pictures"):
        assert Path(summary["places"][place]).exists()
    answer = summary["answer"][0]
    validation = load_coco(Path(summary["places"]["model"], "validation.json"))
    assert answer["image"] == validation.uri(0)
    assert answer["image"].startswith("s3://")
    assert len(summary["answer"]) == len(list(Path(summary["places"]["pictures"]).iterdir())) == 4
    assert all(d["class"] in validation.classes for d in answer["detections"])
    steps = ("split", "train", "evaluate", "export", "gate", "deploy", "record", "train-baseline", "evaluate-baseline")
    for step in steps:
        assert summary["seconds"][step] > 0
    assert "supervised" in output
    [version] = summary["lineage"]["versions"]
    assert version["data"]["labeled"]["fingerprint"] in output
    # by itself, and from a folder, the split is that of the pipeline
    alone = split(str(data), str(tmp_path / "splits"), percent=30, stratify=True, validation_fraction=0.2)
    for part in ("labeled", "validation"):
        assert alone[part]["fingerprint"] == version["data"][part]["fingerprint"]
    # what could never take this one's place is told before it is trained
    other = start(tmp_path, "--data", str(write_coco(tmp_path / "pets")))
    output = other.communicate(timeout=120)[0]
    assert other.returncode == 2, output
    assert "lacks the classes eight, five, four, nine, one, ... of the model that an earlier run left" in output
    assert "[split]" not in output
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_stops_everything(data, tmp_path, signum):
    run = start(tmp_path, "--data", str(data), "--preset", "demo", "--percent", "30")
    seen = []
    for line in run.stdout:
        seen.append(line)
        if line.startswith("[split]"):
            break
    assert left_behind(tmp_path), "".join(seen)
    run.send_signal(signum)
    rest = run.communicate(timeout=60)[0]
    assert run.returncode == (130 if signum == signal.SIGINT else 143), "".join(seen) + rest
    deadline = time.monotonic() + 10
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_behind(tmp_path) == []
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "/nowhere"], "/nowhere: no such folder"),
        (["--preset", "dmo"], "did you mean demo"),
        (["--set", "training.iteration=5"], "did you mean training.iterations"),
        (["--percent", "0"], "must be more than 0 and at most 100"),
        (["--percent", "100"], "leaves no unlabelled image"),
        (["--percent", "100", "--unlabeled", "/nowhere"], "/nowhere: no such folder; give one of images"),
        (["--data", "/usr/lib", "--unlabeled", "/usr"], "/usr: holds the data set itself; give a folder beside it"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, options, says):
    run = start(tmp_path / "out", *options)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 2
    assert says in output
    assert "Traceback" not in output
