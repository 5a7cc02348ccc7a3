"""The command line: exit codes, one line for what is wrong, nothing half-written."""

import errno
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml

from softteacher import cli, storage
from softteacher.config import Settings
from tests.arrivals import Place, picture
from tests.samples import TINY, write_coco

COMMANDS = (
    *("split", "collect", "commit", "train", "config", "evaluate", "analyze", "rank", "watch", "export", "deploy"),
    *("predict", "demo", "gate", "record", "lineage", "follow", "promote", "rollback", "status"),
)
SETS = [part for override in TINY for part in ("--set", override)]


def test_help_imports_nothing_that_takes_time():
    heavy = "('torch', 'onnx', 'onnxruntime', 'faster_coco_eval', 'botocore', 'pydantic', 'numpy', 'PIL', 'urllib3')"
    script = f"import softteacher.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("cli") / "set")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: softteacher {command}" in " ".join(out.split())


def test_usage(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    server = ("--repository", ".", "--triton", "http://127.0.0.1:9")
    for arguments in (
        *(["nonsense"], ["split"], ["split", "--percent", "abc"], ["train", "--method", "magic"]),
        *(["follow", *server, "--every", value] for value in ("inf", "nan")),
        *(["rollback", *server, "--name", "a", "--timeout", value] for value in ("inf", "nan", "1e6")),
        ["lineage", "cards", "--registry", "r", *server[:2], "--version", "0"],
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err[0].startswith("Usage: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_text_is_blank(run, command):
    """As with an unset variable of the shell; a blank path would be the working folder."""
    (function,) = (
        known.callback
        for group in cli.app.registered_groups
        for known in group.typer_instance.registered_commands
        if known.callback.__name__ == command
    )
    texts = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, info = get_args(parameter.annotation)
        if {str, list[str]} & {kind, *get_args(kind)} and parameter.default != "":
            # typer takes the first text of an annotation's Option() for a default, until it reads the command
            flags = [flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]
            positional = isinstance(info, typer.models.ArgumentInfo)
            texts.append([] if positional else [*flags, "--" + name.replace("_", "-")][:1])
    assert texts
    for flag in texts:
        code, out, err = run(command, *flag, " ")
        assert (code, out) == (2, "")
        assert "it is empty; give a value" in err[-1], flag


def test_the_run_of_a_commit_may_be_empty(run, tmp_path):
    _, _, err = run("commit", "--run", "", "--state", tmp_path, "--pending", tmp_path / "none", "--accepted")
    assert "pending.json: no such file" in err[-1]


def test_the_main_line(run, digits, trained, exported, tmp_path):
    out = tmp_path / "s"
    code, printed, _ = run("split", "--data", digits, "--percent", "50", "--fold", "2", "--out", out, "--stratify")
    assert code == 0
    assert json.loads(printed.splitlines()[-1]) == {"labeled": 6, "unlabeled": 6, "validation": 6}
    parts = [x for n in ("labeled", "unlabeled", "validation") for x in (f"--{n}", out / f"{n}.json")]
    short = ["--set", "training.iterations=2"]
    code, printed, _ = run("train", *parts, "--preset", "demo", *SETS, *short, "--out", tmp_path / "m")
    assert code == 0
    assert {"teacher_AP", "student_AP"} <= set(json.loads(printed.splitlines()[-1]))
    run("train", *parts, "--preset", "demo", *SETS, *short, "--method", "supervised", "--out", tmp_path / "b")
    assert yaml.safe_load((tmp_path / "b" / "settings.yaml").read_text())["method"]["name"] == "supervised"
    code, printed, _ = run(
        "evaluate", "--model", tmp_path / "m", "--data", out / "validation.json", "--out", tmp_path / "e"
    )
    assert code == 0
    assert set(json.loads(printed.splitlines()[-1])) == {"AP", "AP50", "AP75", "AP_low_scores"}
    code, printed, _ = run(
        "analyze", "--model", tmp_path / "m", "--data", out / "validation.json", "--out", tmp_path / "a"
    )
    assert code == 0
    assert set(json.loads(printed.splitlines()[-1])) == {"best_f1", "advice"}
    code, printed, _ = run(
        "rank", "--model", tmp_path / "m", "--unlabeled", out / "unlabeled.json", "--top", "3", "--out", tmp_path / "r"
    )
    assert code == 0
    facts = json.loads(printed.splitlines()[-1])
    assert facts == {"images": 3, "first": json.loads((tmp_path / "r" / "ranking.json").read_text())[0]["file_name"]}


def test_a_round(run, tmp_path):
    place = Place(str(tmp_path / "data"), tmp_path)
    place.put("10.png", picture(10))
    where = ["--source", place.source, "--state", place.state, "--base", place.base, "--out", tmp_path / "r"]
    # of the rejected round nothing is used again
    for expected in (
        {"enough": True, "round": 1, "new": 1, "unlabeled": 4},
        {"enough": False, "round": 2, "new": 0, "unlabeled": 3},
    ):
        code, printed, _ = run("collect", *where)
        assert code == 0
        facts = json.loads(printed.splitlines()[-1])
        assert facts.items() >= (expected | {"new_labeled": 0, "labeled": 2, "validation": 2}).items()
        code, printed, _ = run(
            "commit", "--state", place.state, "--pending", tmp_path / "r", "--rejected", "--run", "x"
        )
        assert code == 0
        assert json.loads(printed.splitlines()[-1])["round"] == (1 if expected["enough"] else None)
    code, _, err = run("commit", "--state", place.state, "--pending", tmp_path / "nowhere", "--accepted")
    assert code == 2
    assert "pending.json: no such file" in err[-1]
    assert run("commit", "--state", place.state, "--pending", tmp_path / "r")[0] == 2  # neither accepted nor rejected


def test_config(run):
    code, out, _ = run("config", "--preset", "demo", "--set", "training.iterations=5")
    assert code == 0
    assert "# presets: coco-10pct" in out
    tree = yaml.safe_load(out)
    assert tree["training"]["iterations"] == 5
    assert set(tree) == set(Settings.model_fields)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", ["split", "train", "evaluate"])
def test_a_full_disk(run, tmp_path, monkeypatch, trained, manifests, data, command):
    arguments = {
        "split": ["split", "--data", data, "--percent", "25"],
        "train": [
            "train",
            "--labeled",
            manifests / "labeled.json",
            "--method",
            "supervised",
            "--preset",
            "demo",
            *SETS,
        ],
        "evaluate": ["evaluate", "--model", trained],
    }[command]
    if command != "split":
        arguments += ["--validation" if command == "train" else "--data", manifests / "validation.json"]
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert "the disk is full; free some space" in err[-1]
    log = tmp_path / "out" / "log"  # of the training that came to nothing
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != log] == []


def test_a_failure_of_ours_is_exit_1(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("softteacher.data.split.find_annotations", lambda data: 1 / 0)
    code, _, err = run("split", "--data", data, "--percent", "25", "--out", tmp_path / "out")
    assert code == 1
    assert len(err) == 1
    assert err[0].startswith("internal error: ZeroDivisionError")
    (log,) = tmp_path.iterdir()
    assert str(log) in err[0]
    assert "Traceback" in log.read_text()


def test_a_message_is_one_line_whatever_it_quotes(run, tmp_path):
    code, _, err = run("split", "--data", f"{tmp_path}/a\nb", "--percent", "25", "--out", tmp_path / "out")
    assert code == 2
    assert len(err) == 1


def test_as_a_program(data, tmp_path):
    command = [sys.executable, "-c", "from softteacher.cli import main; main()", "split", "--data", str(data)]
    good = subprocess.run([*command, "--percent", "25", "--out", str(tmp_path / "a")], capture_output=True, text=True)
    assert (good.returncode, json.loads(good.stdout)["labeled"]) == (0, 2)
    assert sorted(f.name for f in storage.list_files(tmp_path / "a")) == sorted(
        ["labeled.json", "split.json", "unlabeled.json", "validation.json"]
    )
    wrong = subprocess.run([*command, "--percent", "0", "--out", str(tmp_path / "b")], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines() == ["error: --percent 0: must be more than 0 and at most 100, e.g. 10"]


def test_sigterm_leaves_no_scratch_folder(data, tmp_path):
    """While Triton, here a socket that never answers, is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        triton = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "softteacher", "predict", "--triton", triton, "--name", "x"]
        command += [str(data / "images" / "1.png"), "--format", "json", "--output", str(tmp_path / "found.json")]
        (tmp_path / "scratch").mkdir()
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path / "scratch")})
        try:
            until = time.monotonic() + 60
            while not list((tmp_path / "scratch").glob(".softteacher-*")):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            process.terminate()
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not list((tmp_path / "scratch").glob(".softteacher-*"))
    assert not (tmp_path / "found.json").exists()
