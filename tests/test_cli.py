"""The command line: exit codes, one line for what is wrong, nothing half-written."""

import errno
import inspect
import json
import os
import shutil
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
from tests.samples import TINY, coco_tree, write_coco, write_json

COMMANDS = (
    *("split", "collect", "commit", "train", "config", "evaluate", "analyze", "rank", "watch", "export", "deploy"),
    *("predict", "demo", "gate", "record", "lineage", "follow", "promote", "rollback", "status"),
)
SETS = [part for override in TINY for part in ("--set", override)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; returns exit code, standard output and the lines of standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["softteacher", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if "[###" not in line]

    return call


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


def bad(tmp_path, name):
    """The arguments of a command with one thing wrong."""
    tree = coco_tree()
    folder = tmp_path / "in"
    write_coco(folder)
    split = ["split", "--data", folder, "--percent", "25", "--out", tmp_path / "out"]
    train = ["train", "--labeled", folder / "annotations" / "instances_train.json", "--method", "supervised"]
    train += ["--validation", folder / "annotations" / "instances_val.json", "--preset", "demo", *SETS]
    train += ["--out", tmp_path / "out"]
    file = folder / "annotations" / "instances_train.json"
    endpoint = ["--triton", "http://127.0.0.1:9", "--name", "x", "--repository", tmp_path / "out"]
    predict = ["predict", "--triton", "http://127.0.0.1:9", "--name", "x", folder / "images" / "1.png"]
    predict += ["--format", "json"]
    match name:
        case "no data":
            split[2] = "/nowhere"
        case "no json":
            shutil.rmtree(folder / "annotations")
        case "broken json":
            file.write_text("{")
        case "missing key":
            write_json(file, {"images": tree["images"]})
        case "zero boxes":
            write_json(file, tree | {"annotations": []})
        case "class sets":
            write_json(file, tree | {"categories": [*tree["categories"], {"id": 5, "name": "cow"}]})
        case "leaves":
            tree["images"][2]["file_name"] = "../../secret.png"
            write_json(file, tree)
        case "leaves by link":
            (folder / "images" / "3.png").unlink()
            (folder / "images" / "3.png").symlink_to("/etc/hostname")
        case "two broken images":
            for n in (1, 2):
                (folder / "images" / f"{n}.png").write_bytes(b"")
        case "percent":
            split[4] = "100"
        case "out is a file":
            (tmp_path / "out").write_text("precious")
        case "out under a file":
            (tmp_path / "file").write_text("precious")
            split[6] = tmp_path / "file" / "out"
        case "no s3":
            split[2] = "s3://bucket/data"
        case "no s3 for the output":
            split[6] = "s3://bucket/out"
        case "bad s3 uri":
            split[2] = "s3://"
        case "another store":
            split[6] = "gs://bucket/out"
        case "one slash":
            split[2] = "s3:/bucket/data"
        case "capitals":
            train[2] = "S3://bucket/labeled.json"
            return train
        case "file URI":
            return [*predict[:5], f"file://{folder}/images/1.png"]
        case "demo in a bucket":
            return ["demo", "--out", "s3://bucket/demo"]
        case "unknown setting":
            return [*train, "--set", "training.iteration=5"]
        case "unknown preset":
            return [*train, "--preset", "demos"]
        case "bad value":
            return [*train, "--set", "training.lr=fast"]
        case "no model":
            return ["evaluate", "--model", folder, "--data", file, "--out", tmp_path / "out"]
        case "no model to export":
            return ["export", "--model", "/nowhere", "--out", tmp_path / "out"]
        case "no triton":
            return predict
        case "no image":
            return ["predict", "--triton", "http://127.0.0.1:9", "--name", "x", "/nowhere.png"]
        case "output is a folder":
            return [*predict, "--output", folder]
        case "output is an image":
            (tmp_path / "link").symlink_to(folder)
            return [*predict, "--output", tmp_path / "link" / "images" / "1.png"]
        case "output is a part":
            (tmp_path / "a.json").write_text("[]")
            return [*predict, "--output", tmp_path / "a.json", "--join", tmp_path / "a.json"]
        case "deploy nothing":
            return ["deploy", "--onnx", "/nowhere", *endpoint]
        case "canary of all":
            return ["deploy", "--onnx", "/nowhere", "--canary", "100%", *endpoint]
        case "rollback without triton":
            return ["rollback", *endpoint]
        case "promote without triton":
            return ["promote", *endpoint]
        case "status of nothing":
            return ["status", *endpoint[:-1], "s3://bucket/models"]
        case "status in a typo":
            return ["status", *endpoint[:-1], "/nowhere/typo"]
        case "localhost:abc" | "localhost:99999" | "http://[::1":
            return ["rollback", "--triton", name, *endpoint[2:]]
        case "predict as another name":
            return ["predict", "--triton", "http://127.0.0.1:9", "--name", "a/b", folder / "images" / "1.png"]
        case "shard in a table":
            return ["predict", *endpoint[:4], "--shard", "1/2", folder / "images"]
        case "demo into a file":
            (tmp_path / "file").write_text("precious")
            return ["demo", "--out", tmp_path / "file"]
    return split


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no data", "/nowhere: no such folder or prefix"),
        ("no json", "needs annotations/instances_train.json"),
        ("broken json", "instances_train.json: broken json"),
        ("missing key", "no key 'annotations'"),
        ("zero boxes", "not one labelled box"),
        ("class sets", "the class sets differ"),
        ("leaves", "image 3: file_name '../../secret.png' leaves the image folder"),
        ("leaves by link", "image 3: file_name '3.png' leaves the image folder by a link"),
        ("two broken images", "2 of 8 images are missing or broken, 1 allowed"),
        ("percent", "--percent 100: leaves no unlabelled image; give others with --unlabeled"),
        ("out is a file", "out: is a file, but a folder is needed"),
        ("out under a file", "is a file where a folder is needed"),
        ("no s3", "s3://bucket/data: S3 at http://127.0.0.1:9 can't be reached"),
        ("no s3 for the output", "s3://bucket/out: S3 at http://127.0.0.1:9 can't be reached"),
        ("bad s3 uri", "no bucket in the S3 URI"),
        ("another store", "gs://bucket/out/labeled.json: only local paths and s3://bucket/key are supported"),
        ("one slash", "s3:/bucket/data: only local paths"),
        ("capitals", "S3://bucket/labeled.json: only local paths"),
        ("file URI", "images/1.png: only local paths"),
        ("demo in a bucket", "--out s3://bucket/demo: the demo writes to this machine"),
        ("unknown setting", "training.iteration: no such setting; did you mean training.iterations?"),
        ("unknown preset", "did you mean demo?"),
        ("bad value", "training.lr = 'fast'"),
        ("no model", "is no model folder"),
        ("no model to export", "/nowhere: no such file or folder"),
        ("no triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("no image", "/nowhere.png: no such file"),
        ("output is a folder", "in: is a folder, but a file is needed for the output"),
        ("output is an image", "1.png: is one of the inputs, the answers would replace it"),
        ("output is a part", "a.json: is one of the inputs, the answers would replace it"),
        ("deploy nothing", "/nowhere: no such file or folder"),
        ("canary of all", "--canary 100%: is no share of the requests; write 10% or 0.1"),
        ("rollback without triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("promote without triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("status of nothing", "S3 at http://127.0.0.1:9 can't be reached"),
        ("status in a typo", "/nowhere/typo: no such folder, nor one around it; check --repository"),
        ("localhost:abc", "localhost:abc: not a URL of Triton; write http://host:port"),
        ("localhost:99999", "localhost:99999: not a URL of Triton"),
        ("http://[::1", "http://[::1: not a URL of Triton"),
        ("predict as another name", "--name a/b: only letters"),
        ("shard in a table", "--shard 1/2: only JSON can be joined; add --format json --output FILE"),
        ("demo into a file", "file: can't be a folder (File exists); choose another"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    arguments = bad(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert err[-1] == errors[0]
    assert message in errors[0]
    assert "Traceback" not in "\n".join(err)
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


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
