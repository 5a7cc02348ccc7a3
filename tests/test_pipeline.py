"""The pipeline compiled, and run on this machine with doubles for the library's six functions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp import components

import pipeline

ROOT = Path(__file__).parents[1]
REQUIRED = ["--data", "s3://data/cards", "--repository", "s3://models/triton", "--triton", "http://127.0.0.1:8000"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python pipeline.py ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pipeline.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            pipeline.main()
    return exit.value.code, *capsys.readouterr()


@pytest.fixture
def compiled(tmp_path: Path, capsys) -> tuple[dict, dict]:
    """The two documents of the compiled YAML: pipeline and platform."""
    options = {
        **{"--out": tmp_path, "--train-image": "r.example/train:1", "--tools-image": "r.example/tools:1"},
        **{
            "--gpus": 2,
            "--gpu-type": "amd.com/gpu",
            "--memory": "48Gi",
            "--cpu": "12",
            "--shm": "16Gi",
            "--retries": 3,
        },
        **{"--node-selector": "pool=gpu", "--s3-secret": "s3-keys", "--s3-endpoint": "http://s3.example:8333"},
    }
    flags = [str(x) for pair in options.items() for x in pair]
    taints = ["--toleration", "amd.com/gpu=yes:NoSchedule", "--toleration", "spot:NoExecute"]
    code, out, err = run(capsys, "compile", *flags, *taints)
    assert (code, err) == (0, "")
    assert Path(out.strip()) == tmp_path / "training_pipeline.yaml"
    return tuple(yaml.safe_load_all((tmp_path / "training_pipeline.yaml").read_text()))


def test_compiled_pipeline_is_one_that_kfp_loads(compiled, tmp_path: Path):
    loaded = components.load_component_from_file(str(tmp_path / "training_pipeline.yaml"))
    assert loaded.component_spec.inputs["overrides"].type == "List"
    assert {k for k, v in loaded.component_spec.inputs.items() if not v.optional} == {"data", "repository", "triton"}


def test_compiled_steps_have_images_resources_and_endpoint(compiled):
    executors = {k: v["container"] for k, v in compiled[0]["deploymentSpec"]["executors"].items()}
    on_gpu = {"exec-train", "exec-train-2", "exec-evaluate", "exec-evaluate-2"}
    assert set(executors) == on_gpu | {"exec-split", "exec-export", "exec-gate", "exec-deploy"}
    assert {k for k, v in executors.items() if v["image"] == "r.example/train:1"} == on_gpu | {"exec-export"}
    assert {k for k, v in executors.items() if "accelerator" in v["resources"]} == on_gpu
    resources = executors["exec-train"]["resources"]
    assert resources["accelerator"]["resourceType"] == "amd.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "2"
    assert (resources["resourceMemoryLimit"], resources["resourceCpuLimit"]) == ("48Gi", "12")
    endpoint = [{"name": "AWS_ENDPOINT_URL_S3", "value": "http://s3.example:8333"}]
    assert [v["env"] for v in executors.values()] == [endpoint] * len(executors)
    assert not any("pip install" in part for v in executors.values() for part in v["command"])


def test_compiled_steps_have_nodes_shared_memory_and_secret(compiled):
    executors = compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    training = executors["exec-train-2"]
    assert training["nodeSelector"] == {"labels": {"pool": "gpu"}}
    assert training["tolerations"] == [
        {"key": "amd.com/gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]
    [mount] = training["emptyDirMounts"]
    assert (mount["medium"], mount["mountPath"], mount["sizeLimit"]) == ("Memory", "/dev/shm", "16Gi")
    assert "nodeSelector" not in executors["exec-gate"]
    for executor in executors.values():
        [secret] = executor["secretAsEnv"]
        assert secret["secretName"] == "s3-keys"
        assert [k["envVar"] for k in secret["keyToEnv"]] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]


def test_compiled_steps_retry_with_backoff_and_are_not_cached(compiled):
    steps = [t for t in tasks(compiled[0]).values() if "condition" not in t["componentRef"]["name"]]
    assert len(steps) == 8
    for task in steps:
        assert task["retryPolicy"]["maxRetryCount"] == 3
        assert task["retryPolicy"]["backoffDuration"] == "60s"
        assert "enableCache" not in task["cachingOptions"]


def test_compiled_pipeline_has_no_secret_value(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-that-is-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-that-is-secret")
    run(capsys, "compile", "--out", tmp_path, "--s3-secret", "s3-keys")
    assert "that-is-secret" not in (tmp_path / "training_pipeline.yaml").read_text()


def test_compile_without_accelerator(tmp_path: Path, capsys):
    run(capsys, "compile", "--out", tmp_path, "--gpus", 0)
    assert "accelerator:" not in (tmp_path / "training_pipeline.yaml").read_text()


def tasks(document: dict) -> dict[str, dict]:
    """All tasks of the compiled pipeline by their shown name."""
    dags = [document["root"]["dag"], *(c["dag"] for c in document["components"].values() if "dag" in c)]
    return {task["taskInfo"]["name"]: task for dag in dags for task in dag["tasks"].values()}


def constants(task: dict) -> dict[str, object]:
    """A task's inputs that are fixed when the pipeline is compiled."""
    return {
        name: value["runtimeValue"]["constant"]
        for name, value in task["inputs"]["parameters"].items()
        if "runtimeValue" in value
    }


def test_compiled_training_has_a_process_an_accelerator_and_checkpoints_of_its_own(tmp_path: Path, capsys):
    run(capsys, "compile", "--out", tmp_path, "--gpus", 4, "--checkpoints", "s3://b/checkpoints")
    document, _ = yaml.safe_load_all((tmp_path / "training_pipeline.yaml").read_text())
    for name in ("train", "train-baseline"):
        given = constants(tasks(document)[name])
        # KFP replaces the placeholder of the run's id only where it is the whole value
        assert given["run"] == "{{$.pipeline_job_uuid}}"
        assert (given["checkpoints"], given["name"], given["processes"]) == ("s3://b/checkpoints", name, 4)
    executors = document["deploymentSpec"]["executors"]
    counts = {
        k: v["container"]["resources"]["accelerator"]["resourceCount"]
        for k, v in executors.items()
        if "-" in k and "accelerator" in v["container"].get("resources", {})
    }
    assert counts == {"exec-train": "4", "exec-train-2": "4", "exec-evaluate": "1", "exec-evaluate-2": "1"}


def test_compiled_training_on_many_nodes(tmp_path: Path, capsys):
    options = ["--gpus", 8, "--nodes", 2, "--checkpoints", "s3://b/checkpoints", "--s3-secret", "s3-keys"]
    options += ["--train-image", "r.example/train:1", "--tools-image", "r.example/tools:1", "--shm", "64Gi"]
    options += ["--node-selector", "pool=gpu", "--toleration", "spot:NoExecute"]
    code, _, err = run(capsys, "compile", "--out", tmp_path, *options)
    assert (code, err) == (0, "")
    components.load_component_from_file(str(tmp_path / "training_pipeline.yaml"))
    document, platform = yaml.safe_load_all((tmp_path / "training_pipeline.yaml").read_text())
    for name, suffix in (("train", ""), ("train-baseline", "-2")):
        given = constants(tasks(document)[name])
        assert (given["nodes"], given["processes"], given["shm"]) == (2, 8, "64Gi")
        assert given["image"] == "r.example/train:1"
        assert "task_config" not in given  # KFP's driver fills it in
        component = document["components"][f"comp-train-nodes{suffix}"]
        assert component["inputDefinitions"]["parameters"]["task_config"]["parameterType"] == "TASK_CONFIG"
        # of these only the environment is the launching pod's too
        passed = {p["field"]: p.get("applyToTask", False) for p in component["taskConfigPassthroughs"]}
        assert {field for field, applied in passed.items() if applied} == {"ENV"}
        assert {"RESOURCES", "KUBERNETES_NODE_SELECTOR", "KUBERNETES_TOLERATIONS", "KUBERNETES_VOLUMES"} < set(passed)
        container = document["deploymentSpec"]["executors"][f"exec-train-nodes{suffix}"]["container"]
        assert container["image"] == "r.example/tools:1"
        assert container["resources"]["accelerator"]["resourceCount"] == "8"
        executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-train-nodes{suffix}"]
        assert executor["nodeSelector"] == {"labels": {"pool": "gpu"}}
        assert [secret["secretName"] for secret in executor["secretAsEnv"]] == ["s3-keys"]
        assert "emptyDirMounts" not in executor  # KFP would mount it here, not on the nodes


@pytest.mark.parametrize("checkpoints", [[], ["--checkpoints", "/mnt/checkpoints"]])
def test_many_nodes_need_a_prefix_on_s3(tmp_path: Path, capsys, checkpoints):
    code, _, err = run(capsys, "compile", "--out", tmp_path, "--nodes", 2, *checkpoints)
    assert (code, err.count("\n")) == (2, 1)
    assert "add --checkpoints s3://bucket/prefix" in err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--node-selector", "gpu"), ("--toleration", "gpu"), ("--toleration", "gpu:Never"), ("--memory", "lots")],
)
def test_compile_refuses_in_one_line(tmp_path: Path, capsys, flag, value):
    code, _, err = run(capsys, "compile", "--out", tmp_path, flag, value)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "training_pipeline.yaml").exists()


# ---- run-local: the real steps in their real processes; only the library's functions are doubles

DOUBLES = """
import json, os, sys, types
from pathlib import Path

def double(path, answer, *files, out=0):
    module, name = path.rsplit(".", 1)
    def run(*arguments, **options):
        with open(os.environ["CALLS"], "a") as calls:
            print(json.dumps([name, [str(a) for a in arguments], options]), file=calls)
        print("progress of", name, file=sys.stderr)
        if name == os.environ.get("BAD_INPUT"):
            from softteacher.storage import MissingFile
            try:
                open("/nowhere")
            except OSError as error:
                raise MissingFile("/nowhere: no such file; check the path") from error
        if name == os.environ.get("BROKEN"):
            raise ZeroDivisionError("a failure of ours")
        if name == os.environ.get("STOPPED"):
            raise SystemExit(143)
        for file in files:
            Path(arguments[out]).mkdir(parents=True, exist_ok=True)
            Path(arguments[out], file).write_text(name)
        return answer
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], name, run)

part = {"images": 3, "fingerprint": "f"}
double("softteacher.data.split.split", {"labeled": part, "unlabeled": part, "validation": part}, "labeled.json", out=1)
double("softteacher.training.launch.launch", {"teacher": {"AP": .5}}, "settings.yaml", out=3)
double("softteacher.evaluation.evaluate.evaluate", {"teacher": {"AP": .5}}, "report.html", "detections.json", out=2)
parity = {"ap": {"onnxruntime": .5}, "batch_1": {}, "batch_4": {}}
double("softteacher.serving.export.export", parity, "model.onnx", out=1)
decision = types.SimpleNamespace(deploy="REFUSE" not in os.environ, reason="better", ap=.5, champion_ap=None)
double("softteacher.serving.gate.gate", decision)
double("softteacher.serving.deploy.deploy", {"version": 3})
"""


def run_local(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list]:
    """The finished command, and the library's calls as [function, arguments, options]."""
    folder.joinpath("sitecustomize.py").write_text(DOUBLES)
    calls = folder / "calls.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipeline.py"), "run-local", *REQUIRED, "--preset", "demo", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "CALLS": str(calls), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_local_run_with_baseline(tmp_path: Path):
    done, calls = run_local(
        tmp_path, "--baseline", "--set", "training.seed=7", "--gate-delta", "0.01", "--outputs", "outputs.json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    steps = ["split", "train", "evaluate", "export", "gate", "deploy", "train-baseline", "evaluate-baseline"]
    assert set(outputs) == set(steps)
    assert all(outputs[step]["seconds"] > 0 for step in steps)
    assert Path(outputs["train"]["model"], "settings.yaml").read_text() == "launch"
    assert Path(outputs["export"]["onnx"], "model.onnx").is_file()
    assert Path(outputs["evaluate-baseline"]["results"], "detections.json").is_file()
    assert outputs["train"]["model"] != outputs["train-baseline"]["model"]
    assert outputs["evaluate"]["metrics"] == {"teacher_AP": 0.5}
    assert outputs["gate"]["Output"] is True
    assert outputs["gate"]["decision"] == {"ap": 0.5, "reason": "better"}
    assert outputs["deploy"]["facts"] == {"version": 3}

    by_name = {name: (arguments, options) for name, arguments, options in calls}
    assert by_name["gate"] == ([outputs["export"]["onnx"], "s3://models/triton", "detector"], {"delta": 0.01})
    deployed = [outputs["export"]["onnx"], *REQUIRED[3::2], "detector"]
    assert by_name["deploy"] == (deployed, {"backend": "python", "gpu": False})
    trained = [(arguments, options) for name, arguments, options in calls if name == "launch"]
    assert ["name='soft_teacher'" in arguments[4] for arguments, _ in trained] == [True, False]
    assert all("seed=7" in arguments[4] for arguments, _ in trained)
    assert [options["processes"] for _, options in trained] == [1, 1]
    assert [options["checkpoints"] for _, options in trained] == [None, None]
    assert trained[0][0][:3] == trained[1][0][:3]

    assert done.stdout.count("progress of evaluate") == 2
    assert "KFP Executor" not in done.stdout
    assert "executor_input" not in done.stdout


def test_local_run_that_the_gate_refuses(tmp_path: Path):
    done, calls = run_local(tmp_path, REFUSE="1")
    assert done.returncode == 0
    assert {name for name, *_ in calls} == {"split", "launch", "evaluate", "export", "gate"}
    assert set(json.loads(done.stdout[done.stdout.index("\n{\n") :])) == {
        "split",
        "train",
        "evaluate",
        "export",
        "gate",
    }


def test_local_run_on_bad_input(tmp_path: Path):
    done, calls = run_local(tmp_path, "--baseline", BAD_INPUT="launch")
    assert done.returncode == 2
    assert done.stderr == "error: step train: /nowhere: no such file; check the path\n"
    assert "Traceback" not in done.stdout
    assert [name for name, *_ in calls] == ["split", "launch"]


def test_local_run_on_a_failure_of_ours(tmp_path: Path):
    done, _ = run_local(tmp_path, BROKEN="export")
    assert done.returncode == 1
    assert done.stderr == "error: step export failed; its output is above\n"
    assert done.stdout.count("Traceback") == 1
    assert "ZeroDivisionError: a failure of ours" in done.stdout


def test_a_training_that_was_stopped_is_a_step_that_failed(tmp_path: Path):
    done, calls = run_local(tmp_path, STOPPED="launch")  # as at SIGTERM: KFP tries such a step again
    assert (done.returncode, done.stderr) == (1, "error: step train failed; its output is above\n")
    assert [name for name, *_ in calls] == ["split", "launch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.iteration=5"], "did you mean training.iterations?"),
        (["--method", "teacher"], "method.name"),
        (["--percent", "0"], "--percent 0"),
    ],
)
def test_settings_are_checked_before_a_step_starts(capsys, arguments, message):
    code, out, err = run(capsys, "run-local", *REQUIRED, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("command", ["compile", "run-local", "submit"])
def test_help_has_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: python pipeline.py {command}" in " ".join(out.split())
