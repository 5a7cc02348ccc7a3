"""The overlays that comments and documents tell the user to write: kustomize takes them, and they do what is said."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.manifests.conftest import MANIFESTS, Documents, containers, one, pods


@pytest.fixture
def overlay(kustomize: Callable[[Path], Documents], tmp_path: Path) -> Callable[[str, str], Documents]:
    """What an overlay of the user's makes of a folder of the manifests."""

    def build(name: str, text: str) -> Documents:
        shutil.copytree(MANIFESTS, tmp_path / name / "manifests")
        mine = tmp_path / name / "manifests" / "overlays" / "mine"
        mine.mkdir()
        (mine / "kustomization.yaml").write_text(f"resources: [../../{name}]\n{text}")
        return kustomize(mine)

    return build


def test_overlays_that_comments_and_documents_describe(overlay: Callable[[str, str], Documents]) -> None:
    comment = (MANIFESTS / "overlays" / "gpu" / "kustomization.yaml").read_text()
    patch = "\n".join(re.findall(r"^#   (patches:|  .*)", comment, re.M))
    strategy = one(overlay("overlays/gpu", patch), "Deployment")["spec"]["strategy"]
    assert strategy == {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    [patch] = re.findall(r"^#   (patches: .*delete.*)", (MANIFESTS / "steps" / "kustomization.yaml").read_text(), re.M)
    assert {d["kind"] for d in overlay("steps", patch)} == {"ServiceAccount", "Role", "RoleBinding"}
    blocks = {
        page: re.findall(r"^```yaml\n(.*?)^```", (MANIFESTS.parent / "docs" / page).read_text(), re.M | re.S)
        for page in ("kubeflow.md", "serving.md")
    }
    [images], [secret] = blocks.values()
    account = one(overlay("overlays/kserve", secret), "ServiceAccount", "triton")
    assert account["imagePullSecrets"] == [{"name": "registry"}]
    for name in ("overlays/dev", "trainer"):
        used = {c["image"] for _, pod in pods(overlay(name, images)) for c in containers(pod)}
        ours = {c for c in used if c.startswith("registry.example.com/softteacher/") and c.endswith(":0.1.0-1a2b3c4")}
        assert ours
        assert {image.partition("/")[0] for image in used - ours} <= {"chrislusf"}
