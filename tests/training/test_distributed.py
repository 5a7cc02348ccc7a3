"""Two processes train like one with the whole batch: the same curve, the same weights but for rounding, one folder."""

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
from softteacher.data.coco import load_coco
from softteacher.data.loader import _Steps
from softteacher.errors import UserError
from softteacher.training.launch import launch
from tests.samples import TINY

# fixed sizes: the padding of a view depends on what else is in its batch, and at its edge so do the features
CHOSEN = [
    *TINY,
    *(f"method.{key}_threshold=0.06" for key in ("pool", "rpn", "cls")),
    *("method.reg_variance_threshold=9", "training.iterations=8", "training.log_every=1", "method.burn_in=0.25"),
    *("data.scale_jitter=[1.0, 1.0]", "training.evaluate_every=4", "training.checkpoint_every=3"),
    # Adam would make steps of a gradient's rounding errors
    *("training.optimizer=sgd", "training.lr=0.002", "training.warmup_iterations=0"),
]


def sources(manifests):
    return [str(manifests / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]


def log(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def per_process(labeled, unlabeled):
    return [f"training.labeled_per_batch={labeled}", f"training.unlabeled_per_batch={unlabeled}"]


@pytest.mark.parametrize("name", ["supervised", "soft_teacher"])
def test_two_processes_give_the_curve_of_one(manifests, tmp_path, name):
    """Each term of the loss to 1e-3, and the weights; only the order of the sums differs.

    Rounding may turn a match of IoU or an NMS of nearly equal scores into another one, which a fresh detector has many
    of: from the fourth step (with pseudo boxes, the second) on, the curves stay together to 10 % of the loss.
    """
    chosen = [*CHOSEN, f"method.name={name}", "method.burn_in=0"]
    one = load_settings("demo", [*chosen, *per_process(2, 4)])
    two = load_settings("demo", [*chosen, *per_process(1, 2)])
    launch(*sources(manifests), str(tmp_path / "one"), one)
    metrics = launch(*sources(manifests), str(tmp_path / "two"), two, processes=2)
    facts = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert facts["machine"]["processes"] == 2
    assert metrics == json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert not (tmp_path / "two" / "checkpoints").exists()
    strict = 1 if name == "soft_teacher" else 3
    rows = [[r for r in log(tmp_path / n) if "loss" in r] for n in ("one", "two")]
    assert [r["step"] for r in rows[0]] == list(range(1, 9))
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
        for key in set(theirs) - {"images_per_second", *OF_PROCESSES}:
            assert ours["step"] > strict or ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    if name == "supervised":
        for file in ("student.pt", "teacher.pt"):
            a, b = (torch.load(tmp_path / n / file, weights_only=True) for n in ("one", "two"))
            assert all(torch.allclose(v, b[k], rtol=1e-3, atol=1e-3) for k, v in a.items())


# ratios, of which the log has the mean over the processes
OF_PROCESSES = {"reliability", "unsup_over_sup", "pseudo_precision", "pseudo_recall"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_parts_of_all_processes_are_the_whole_batch(manifests, monkeypatch, accumulate):
    """No image twice, none lost: over processes and accumulated batches as in one large one."""
    labeled, unlabeled = load_coco(manifests / "labeled.json"), load_coco(manifests / "unlabeled.json", labeled=False)
    world = 2

    def seeds(step, world_size, rank, per_process, accumulate):
        monkeypatch.setattr("softteacher.distributed.world_size", lambda: world_size)
        monkeypatch.setattr("softteacher.distributed.rank", lambda: rank)
        chosen = [*CHOSEN, *per_process, f"training.accumulate={accumulate}"]
        steps = _Steps(labeled, unlabeled, load_settings("demo", chosen), 0)
        batches = [steps[step * accumulate + n] for n in range(accumulate)]
        return [[(s, v.numpy().tobytes()) for b in batches for s, v in zip(x(b).seeds, x(b).images, strict=True)]
                for x in (lambda b: b.labeled, lambda b: b.weak, lambda b: b.strong)]  # fmt: skip

    whole = seeds(3, 1, 0, per_process(2 * accumulate, 4 * accumulate), 1)
    parts = [seeds(3, world, rank, per_process(1, 2), accumulate) for rank in range(world)]
    for kind in range(3):
        assert sorted(parts[0][kind] + parts[1][kind]) == sorted(whole[kind])
        assert not set(parts[0][kind]) & set(parts[1][kind])


def test_an_error_in_a_process_is_one_line(manifests, tmp_path, capfd):
    tree = json.loads((manifests / "unlabeled.json").read_text())
    tree["softteacher"]["root"] = "/nowhere"
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    labeled, _, validation = sources(manifests)
    settings = load_settings("demo", [*CHOSEN, "method.burn_in=0"])
    with pytest.raises(UserError, match=r"process \d of 2: .*not one of its 6 images can be read"):
        launch(labeled, str(tmp_path / "bad.json"), validation, str(tmp_path / "m"), settings, processes=2)
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "m").exists()


def test_sigterm_reaches_all_processes_and_the_run_goes_on(manifests, tmp_path):
    """Stopped with two processes, it resumes in one with the whole batch."""
    out = tmp_path / "m"
    labeled, unlabeled, validation = sources(manifests)
    command = [sys.executable, "-m", "softteacher", "train", "--preset", "demo", "--out", str(out), "--processes", "2"]
    command += ["--labeled", labeled, "--unlabeled", unlabeled, "--validation", validation]
    long = ["training.iterations=400", "training.evaluate_every=0", "training.checkpoint_every=2"]
    command += [x for o in (*CHOSEN, *per_process(1, 2), *long) for x in ("--set", o)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    until = time.monotonic() + 120
    while not list(storage.list_files(out / "checkpoints")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 143, said
    steps = max(int(f.name[5:14]) for f in storage.list_files(out / "checkpoints"))
    assert 2 <= steps < 400
    # not to the end: that in another number of processes nothing stands against it but what is changed here is enough
    with pytest.raises(UserError, match=r"another run \(training\.iterations is 8, there it was 400\); give"):
        launch(*sources(manifests), str(out), load_settings("demo", [*CHOSEN, *per_process(2, 4), *long[1:]]))
