"""A run that is killed and started again ends with the bits of a run that never was."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from softteacher import storage
from softteacher.config import load_settings
from softteacher.errors import UserError
from softteacher.training.train import train
from tests.samples import TINY

LOW = [f"method.{key}_threshold=0.06" for key in ("pool", "rpn", "cls")]
CHOSEN = [
    *TINY,
    *LOW,
    *("method.reg_variance_threshold=9", "training.iterations=12", "training.log_every=4", "training.evaluate_every=6"),
    *("training.checkpoint_every=2", "training.threads=1", "method.burn_in=0.25", "training.optimizer=adamw"),
]


def sources(manifests):
    return [str(manifests / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]


def start(manifests, out, *overrides):
    """`softteacher train` in a process of its own."""
    labeled, unlabeled, validation = sources(manifests)
    command = [sys.executable, "-m", "softteacher", "train", "--preset", "demo", "--out", str(out)]
    command += ["--labeled", labeled, "--unlabeled", unlabeled, "--validation", validation]
    command += [x for o in (*CHOSEN, *overrides) for x in ("--set", o)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=dict(os.environ), start_new_session=True, **pipes)


def wait_for_a_checkpoint(out, process, steps=0):
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if any(int(f.name[5:14]) > steps for f in storage.list_files(f"{out}/checkpoints") if f.name.endswith(".pt")):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint: {process.communicate()}")


def steps_done(out):
    return max((int(f.name[5:14]) for f in storage.list_files(f"{out}/checkpoints")), default=0)


def content(folder):
    """What must be equal: weights, metrics and the log without its clock."""
    weights = {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in ("student", "teacher")}
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    clock = {"images_per_second", "evaluation_seconds"}
    return weights, (folder / "metrics.json").read_text(), [{k: v for k, v in r.items() if k not in clock} for r in log]


def assert_same(a, b):
    for name in ("student", "teacher"):
        assert a[0][name].keys() == b[0][name].keys()
        assert all(torch.equal(v, b[0][name][k]) for k, v in a[0][name].items())
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def whole(manifests, tmp_path_factory):
    """A run that nobody touched."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    threads = torch.get_num_threads()
    train(*sources(manifests), str(folder), load_settings("demo", CHOSEN))
    torch.set_num_threads(threads)
    return content(folder)


def test_killed_again_and_again(manifests, tmp_path, whole):
    for _ in range(2):
        process = start(manifests, tmp_path / "m")
        wait_for_a_checkpoint(tmp_path / "m", process, steps_done(tmp_path / "m"))
        process.kill()
        process.communicate()
    assert not (tmp_path / "m" / "provenance.json").exists()
    process = start(manifests, tmp_path / "m")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "goes on at step" in said
    assert_same(content(tmp_path / "m"), whole)
    assert not (tmp_path / "m" / "checkpoints").exists()


def test_burn_in_is_shared(manifests, tmp_path, whole, capsys):
    """Supervised training leaves its burn-in for Soft Teacher, which ends as if it had done all by itself."""
    chosen = [*CHOSEN, f"method.burn_in_cache={tmp_path}/burn_in"]
    other = [*chosen, "method.name=supervised", "training.unlabeled_per_batch=1"]  # of which it reads none
    train(*sources(manifests), str(tmp_path / "s"), load_settings("demo", other))
    assert "goes on" not in capsys.readouterr().err
    train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", chosen))
    assert f"goes on at step 3 of 12, from {tmp_path}/burn_in" in capsys.readouterr().err.replace("\n", "")
    assert_same(content(tmp_path / "m"), whole)


def test_burn_in_of_other_settings_is_refused(manifests, tmp_path):
    chosen = [*CHOSEN, f"method.burn_in_cache={tmp_path}/burn_in", "method.name=supervised"]
    train(*sources(manifests), str(tmp_path / "s"), load_settings("demo", chosen))
    with pytest.raises(UserError, match=r"another run \(training\.lr"):
        train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", [*chosen, "training.lr=0.5"]))


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_told_to_stop(manifests, tmp_path, whole, number, group):
    """The step under way ends, a checkpoint is written, the exit code says which signal it was.

    `timeout` and service managers tell the loader processes, too.
    """
    process = start(manifests, tmp_path / "m", "training.checkpoint_every=1", f"data.workers={2 * group}")
    wait_for_a_checkpoint(tmp_path / "m", process)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 128 + number, said
    assert "a checkpoint is written" in said
    assert steps_done(tmp_path / "m") >= 1
    train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", CHOSEN))
    assert_same(content(tmp_path / "m"), whole)


def test_stopped_in_a_validation(manifests, tmp_path, whole, monkeypatch):
    """The weights of that step are saved at once, and the validation is done anew."""
    from softteacher.training import train as module

    real, asked = module.score, []

    def slow(*arguments):
        asked.append(1)
        if len(asked) == 1:  # at the end of burn-in
            return real(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("the signal did not come through")

    monkeypatch.setattr(module, "score", slow)
    with pytest.raises(SystemExit) as e:
        train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", [*CHOSEN, "training.checkpoint_every=0"]))
    assert e.value.code == 128 + signal.SIGTERM
    assert steps_done(tmp_path / "m") == 6
    # what there is to look at so far, which the model folder has at the end
    assert [json.loads(line)["step"] for line in (tmp_path / "m/log/training.jsonl").read_text().splitlines()] == [3, 4]
    assert list((tmp_path / "m" / "log").glob("events.out.tfevents.*"))
    monkeypatch.setattr(module, "score", real)
    train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", CHOSEN))
    assert_same(content(tmp_path / "m"), whole)
    assert not (tmp_path / "m" / "log").exists()


def test_from_s3(manifests, tmp_path, whole, s3):
    process = start(manifests, f"{s3}/m")
    wait_for_a_checkpoint(f"{s3}/m", process)
    process.kill()
    process.communicate()
    train(*sources(manifests), f"{s3}/m", load_settings("demo", CHOSEN))
    storage.copy(f"{s3}/m", tmp_path / "m")
    assert_same(content(tmp_path / "m"), whole)
    assert not any("checkpoints" in f.name for f in storage.list_files(f"{s3}/m"))


def test_a_finished_run_is_not_repeated(manifests, tmp_path, capsys, monkeypatch):
    short = [*TINY, "training.iterations=2"]
    quick = load_settings("demo", short)
    metrics = train(*sources(manifests), str(tmp_path / "m"), quick)
    before = (tmp_path / "m" / "provenance.json").read_bytes()
    monkeypatch.setattr("softteacher.training.train.run_training", lambda *_: pytest.fail("it trained"))
    assert train(*sources(manifests), str(tmp_path / "m"), quick) == metrics
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"m: holds the model of another run \(training\.lr is 0\.5, there it was 0\.001\)"
    ):
        train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", [*short, "training.lr=0.5"]))
    assert (tmp_path / "m" / "provenance.json").read_bytes() == before


def test_a_full_disk(manifests, tmp_path):
    """No checkpoint fits: training goes on and says so. The model doesn't fit: one line, and no torn model folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        process = start(manifests, disk / "m")
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "warning: no checkpoint: " in said
        assert "the disk is full; free some space" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert not (disk / "m" / "provenance.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        process = start(manifests, disk / "m")
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_another_run_is_not_resumed(manifests, tmp_path):
    settings = [*TINY, "training.iterations=4", "training.checkpoint_every=2"]

    def cut(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softteacher.training.train.ModelFolder.write", cut)
        with pytest.raises(KeyboardInterrupt):
            train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", settings))
    left = sorted(p.name for p in (tmp_path / "m" / "checkpoints").iterdir())
    assert left
    with pytest.raises(UserError, match=r"another run \(training.lr is 0.5, there it was 0.001\)"):
        train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", [*settings, "training.lr=0.5"]))
    assert sorted(p.name for p in (tmp_path / "m" / "checkpoints").iterdir()) == left
    indifferent = ["data.workers=1", "training.log_every=1", "training.checkpoint_every=3"]
    train(*sources(manifests), str(tmp_path / "m"), load_settings("demo", [*settings, *indifferent]))
