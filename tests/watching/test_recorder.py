"""The recorder: what it writes, and that a store that fails costs nothing."""

import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.watching.profile import TrafficProfile
from softteacher.watching.recorder import TrafficRecorder
from tests.watching.test_profile import CLASSES, detections

FOUND = detections((0.9, 1, 5), (0.2, 0, 5))


def recorded(uri):
    return [TrafficProfile.read(f"{uri}/{f.name}") for f in storage.list_files(uri)]


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_files_in_s3_by_day_and_version(s3):
    before = datetime.now(UTC)
    with TrafficRecorder(f"{s3}/traffic/", "cards") as recorder:
        for version in ("3", "4", "3"):
            recorder.add(FOUND, (10, 10), version, CLASSES)
    names = [f.name for f in storage.list_files(f"{s3}/traffic")]
    days = {(before + timedelta(n)).strftime("%Y/%m/%d") for n in (0, 1)}
    assert all(re.fullmatch(r"[\w.-]+-[0-9a-f]{32}\.json", n.split("/")[3]) and n[:10] in days for n in names)
    profiles = recorded(f"{s3}/traffic")
    assert {(p.name, p.version): p.images for p in profiles} == {("cards", "3"): 2, ("cards", "4"): 1}
    assert all(before.isoformat(timespec="seconds") <= p.start <= p.end for p in profiles)


def test_after_so_many_images_or_so_much_time(tmp_path):
    recorder = TrafficRecorder(str(tmp_path / "many"), "n", every_images=3, every_seconds=3600)
    for _ in range(3):
        recorder.add(FOUND, (10, 10), "1", CLASSES)
    wait_for(lambda: [p.images for p in recorded(tmp_path / "many")] == [3])
    recorder.add(FOUND, (10, 10), "1", CLASSES)
    recorder.close()
    recorder.close()  # once is enough
    assert sorted(p.images for p in recorded(tmp_path / "many")) == [1, 3]
    late = TrafficRecorder(str(tmp_path / "late"), "n", every_seconds=0.05)
    late.add(FOUND, (10, 10), "1", CLASSES)
    wait_for(lambda: [p.images for p in recorded(tmp_path / "late")] == [1])
    late.close()
    assert len(recorded(tmp_path / "late")) == 1  # nothing new, no file


def test_shared_by_threads_nothing_is_lost(tmp_path):
    with TrafficRecorder(str(tmp_path), "n", every_images=7) as recorder:

        def work():
            for _ in range(200):
                recorder.add(FOUND, (10, 10), "1", CLASSES)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    profiles = recorded(tmp_path)
    assert sum(p.images for p in profiles) == 1600
    assert sum(p.histograms["class"][1] for p in profiles) == 1600
    assert len(profiles) > 1


def test_a_store_that_fails_is_told_once_and_caught_up_with(tmp_path, capsys):
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be")
    recorder = TrafficRecorder(str(blocked), "n", every_images=2)
    for n in range(40):
        recorder.add(FOUND, (10, 10), "1", CLASSES)
        if n % 10 == 9:
            wait_for(lambda: recorder._new < 2)
    wait_for(lambda: "traffic can't be recorded at present" in capsys.readouterr().err)
    wait_for(lambda: sum(p.images for p in recorder._profiles.values()) == 40)
    assert len(recorder._profiles) == 1  # bounded: one profile, whatever has come
    assert capsys.readouterr().err == ""
    blocked.unlink()
    recorder.add(FOUND, (10, 10), "1", CLASSES)
    recorder.close()
    assert [p.images for p in recorded(blocked)] == [41]
    assert capsys.readouterr().err == ""


def test_a_request_never_waits_for_the_store(tmp_path, monkeypatch, capsys):
    asked, release = threading.Event(), threading.Event()

    def hang(*_):
        asked.set()
        release.wait(60)

    monkeypatch.setattr(storage, "write_bytes", hang)
    recorder = TrafficRecorder(str(tmp_path), "n", every_images=1)
    recorder.add(FOUND, (10, 10), "1", CLASSES)
    assert asked.wait(60)
    for _ in range(500):  # while the store hangs; with a wait in `add` this would never end
        recorder.add(FOUND, (10, 10), "1", CLASSES)
    assert recorder._profiles["1", CLASSES].images == 500
    recorder.close(timeout=0.1)
    assert "the traffic of the last 500 images could not be recorded" in capsys.readouterr().err
    release.set()
    recorder._thread.join(60)


@pytest.mark.parametrize("wrong", [detections((0.9, 7, 5)), None, "nonsense"])
def test_what_can_t_be_counted_is_told_once(tmp_path, capsys, wrong):
    with TrafficRecorder(str(tmp_path), "n") as recorder:
        for _ in range(3):
            recorder.add(wrong, (10, 10), "1", CLASSES)
        recorder.add(FOUND, (10, 10), "1", CLASSES)
    assert capsys.readouterr().err.count("was not counted") == 1
    assert sum(p.images for p in recorded(tmp_path)) == 1
    recorder.add(FOUND, (10, 10), "1", CLASSES)  # after the end: told, not raised


def test_lost_at_the_end_is_told(tmp_path, capsys):
    (tmp_path / "store").write_text("")
    with TrafficRecorder(str(tmp_path / "store"), "n") as recorder:
        recorder.add(FOUND, (10, 10), "1", CLASSES)
    assert "the traffic of the last 1 images could not be recorded" in capsys.readouterr().err


def test_a_program_that_forgets_to_close(tmp_path):
    script = f"""
import numpy as np
from softteacher.detections import Detections
from softteacher.watching.recorder import TrafficRecorder
found = Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, int))
TrafficRecorder({str(tmp_path)!r}, "n").add(found, (10, 10), "1", ["cat"])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.images for p in recorded(tmp_path)] == [1]


def test_a_forked_process_counts_for_itself(tmp_path):
    """What was counted before is the parent's alone; the child's is written, without the parent's thread."""
    script = f"""
import os, time
import numpy as np
from softteacher.detections import Detections
from softteacher.watching.recorder import TrafficRecorder
found = Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, int))
recorder = TrafficRecorder({str(tmp_path)!r}, "n")
for _ in range(2):
    recorder.add(found, (10, 10), "1", ["cat"])
while not recorder._changed._waiters:
    time.sleep(0.01)
if child := os.fork():
    os.waitpid(child, 0)
else:
    for _ in range(3):
        recorder.add(found, (10, 10), "1", ["cat"])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(p.images for p in recorded(tmp_path)) == [2, 3]
