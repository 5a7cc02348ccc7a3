"""What the process asks of the machine."""

import subprocess
import sys

import pytest
import torch

from softteacher.device import find_device, find_precision, set_threads
from softteacher.errors import UserError

FAULTS = """
import resource, torch
from softteacher.device import keep_memory
if {keep}:
    keep_memory()
for n in range(20):
    if n == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_kept_memory_is_not_faulted_in_again():
    freed, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    )
    assert kept < freed / 10


@pytest.mark.parametrize("name", ["nonsense", "meta", "hpu"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(
        UserError, match=rf"training\.device = '{name}': not usable here \(.*\); --set training.device=auto"
    ):
        find_device(name)


@pytest.mark.parametrize("ampere", [True, False])
def test_bf16_on_gpus_that_multiply_it(monkeypatch, ampere):
    """Older ones emulate it, slower than fp32, and by default PyTorch calls that supported."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or ampere)
    assert find_precision("auto", torch.device("cuda")) == (torch.bfloat16 if ampere else torch.float32)


@pytest.mark.parametrize(
    ("asked", "processes", "processors", "expected"),
    [
        (0, None, 2, 2),
        (0, None, 9, 4),
        (3, None, 2, 3),
        (9, None, 2, 9),
        (0, "2", 16, 8),
        (0, "8", 4, 1),
        (3, "2", 4, 3),
    ],
)
def test_threads_of_the_container(monkeypatch, asked, processes, processors, expected):
    """`torch` would take 4, which is less than there may be: OMP_NUM_THREADS is somebody's wish, but torchrun's."""
    monkeypatch.setattr("softteacher.device.cpu_count", lambda: processors)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        set_threads(asked)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
