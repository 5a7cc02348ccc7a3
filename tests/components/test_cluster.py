"""What the options of `compile` make of a step."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import pipeline

LITTLE = ("0.2", "512Mi")


@pytest.mark.parametrize(
    ("options", "limits", "requests"),
    [([], ("4", "8Gi"), ("250m", "1Gi")), (["--tools-cpu", LITTLE[0], "--tools-memory", LITTLE[1]], LITTLE, LITTLE)],
)
def test_small_steps_have_limits_and_reserve_less(tmp_path: Path, options, limits, requests):
    """A quota asks every pod for both limits; what is requested, by default the limits, the scheduler keeps free."""
    done = CliRunner().invoke(pipeline.app, ["compile", "--out", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    document = next(yaml.load_all((tmp_path / "training_pipeline.yaml").read_text(), yaml.CSafeLoader))
    containers = {name: e["container"] for name, e in document["deploymentSpec"]["executors"].items()}
    for step in ("fingerprint", "split", "gate", "deploy", "record", "report"):
        resources = containers[f"exec-{step}"]["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == limits
        assert (resources["resourceCpuRequest"], resources["resourceMemoryRequest"]) == requests
    assert "resourceMemoryRequest" not in containers["exec-train"]["resources"]
