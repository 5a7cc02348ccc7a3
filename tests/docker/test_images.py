"""The images as they were built: who runs, what may be written, what is in them and what isn't."""

import json
import re
import subprocess
from pathlib import Path

import pytest

import softteacher
from tests.docker.conftest import CONFINED, IMAGES

ROOT = Path(__file__).parents[2]
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "cpp", "as", "ld", "make", "cmake", "rustc", "cargo", "go", "nvcc")


@pytest.fixture(params=IMAGES)
def image(request) -> str:
    return request.param


def run(engine, image: str, *command: str, **options) -> str:
    """What a command prints in a container without network, where only /tmp can be written."""
    return engine.containers.run(IMAGES[image], list(command), remove=True, stderr=True, **CONFINED | options).decode()


def test_runs_as_a_user_without_rights(engine, image):
    assert engine.images.get(IMAGES[image]).attrs["Config"]["User"] == "10001:10001"
    assert run(engine, image, "id").startswith("uid=10001(softteacher) gid=10001(softteacher)")
    status = run(engine, image, "cat", "/proc/self/status")
    assert re.search(r"^CapEff:\s+0+$", status, re.M)


def test_only_tmp_can_be_written(engine, image):
    script = 'for d in "$HOME" /opt/* / /etc /usr /var/tmp; do if touch "$d/x" 2>/dev/null; then echo "$d"; fi; done'
    # not because of the read-only file system alone: the user owns nothing
    writable = run(engine, image, "sh", "-c", script, read_only=False).split()
    assert set(writable) <= {"/tmp", "/var/tmp"}
    assert run(engine, image, "sh", "-c", script).split() == ["/tmp"]
    mine = "find / -xdev -user 10001 -not -path '/proc/*' -not -path '/tmp*' -not -path '/dev/*' 2>/dev/null | head"
    assert run(engine, image, "sh", "-c", mine) == ""


def test_holds_no_compiler_and_no_pip(engine, image):
    look = "for c in " + " ".join(COMPILERS) + "; do command -v $c; done; true"
    assert run(engine, image, "sh", "-c", look) == ""
    assert run(engine, image, "sh", "-c", "find / -xdev -name cc1 -o -xdev -name collect2 2>/dev/null; true") == ""
    # nor what could make one, in the environment or in the Python below it
    look = """
    ls -d /usr/local/bin/pip* /opt/*/bin/pip* 2>/dev/null
    for c in pip pip3; do command -v $c; done
    for p in python3 "$(readlink -f "$(command -v python3)")"; do
        for m in pip ensurepip; do "$p" -m $m --version 2>/dev/null; done
    done
    find / -xdev -name 'pip-*.whl' 2>/dev/null
    true"""
    assert run(engine, image, "sh", "-c", look) == ""


def test_labels_say_what_it_was_built_from(engine, image):
    labels = engine.images.get(IMAGES[image]).labels
    named = {key.removeprefix("org.opencontainers.image."): value for key, value in labels.items()}
    assert named["title"] == f"softteacher/{image}"
    assert named["version"] == softteacher.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert named["revision"].removesuffix("-dirty") == head
    assert "source" in named
    assert not re.search(r"://[^/]*@", named["source"])


def test_every_package_has_the_pinned_version(engine, image):
    script = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(run(engine, image, "/opt/venv/bin/python", "-I", "-c", script).splitlines()[-1])
    pins = {}
    for file in ("constraints.txt", "images/triton-requirements.txt")[:: 1 if image == "triton" else -1]:
        lines = (line.split("#")[0].split("==") for line in (ROOT / file).read_text().splitlines())
        pins |= {_name(pin[0]): pin[1].strip() for pin in lines if len(pin) == 2}
    versions = {_name(name): version.split("+")[0] for name, version in installed.items()}
    assert versions == {name: pins.get(name) for name in versions}


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text.strip()).lower()


@pytest.mark.parametrize("uid", ["10001:10001", "12345:0"])  # some clusters choose a number of their own
@pytest.mark.parametrize("image", ["train", "tools"])
def test_the_command_line_works(engine, image, uid):
    assert "training:" in run(engine, image, "softteacher", "config", "--preset", "demo", user=uid)
    assert "Traceback" not in run(engine, image, user=uid)


def test_train_image_trains_and_tools_image_has_no_pytorch(engine):
    script = "import torch, torchvision; from softteacher.training import train; print(torch.ones(2).sum().item())"
    assert "2.0" in run(engine, "train", "python", "-c", script)
    script = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(engine, "tools", "python", "-c", script) == "None\n"


def test_keys_are_in_no_layer(engine, image):
    history = json.dumps(engine.images.get(IMAGES[image]).history())
    assert not re.search(r"AWS_SECRET|PASSWORD|TOKEN|PIP_(EXTRA_)?INDEX_URL", history)
