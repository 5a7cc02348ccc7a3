"""The pipelines compiled, and their command line."""

import sys
from pathlib import Path

import pytest
import yaml
from kfp import components
from typer.testing import CliRunner

import pipeline

ROOT = Path(__file__).parents[1]
REQUIRED = ["--data", "s3://data/cards", "--repository", "s3://models/triton", "--triton", "http://127.0.0.1:8000"]
ARRIVALS = ["--source", "s3://data/incoming", "--state", "s3://data/state", "--base", "s3://data/splits"]
ARRIVALS += ["--registry", "s3://models/registry", *REQUIRED[2:]]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python pipeline.py ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pipeline.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            pipeline.main()
    return exit.value.code, *capsys.readouterr()


def load(folder: Path, name: str = "training") -> tuple[dict, dict]:
    """The two documents of the compiled YAML: pipeline and platform."""
    pipeline, platform = yaml.load_all((folder / f"{name}_pipeline.yaml").read_text(), yaml.CSafeLoader)
    return pipeline, platform


OPTIONS = "--gpus 2 --gpu-type amd.com/gpu --memory 48Gi --cpu 12 --shm 16Gi --retries 3 --node-selector pool=gpu"
OPTIONS += " --toleration amd.com/gpu=yes:NoSchedule --toleration spot:NoExecute --s3-secret s3-keys"
OPTIONS += " --s3-region eu-central-1 --image-pull-secret registry --image-cache 40Gi"
OPTIONS += " --s3-endpoint http://s3.example:8333 --train-image r.example/train:1 --tools-image r.example/tools:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    done = CliRunner().invoke(pipeline.app, ["compile", "--out", str(folder), *OPTIONS.split()])
    written = [str(folder / f"{name}_pipeline.yaml") for name in ("training", "retraining")]
    assert (done.exit_code, done.output.split()) == (0, written)
    return folder


@pytest.fixture(scope="module")
def compiled(folder: Path) -> tuple[dict, dict]:
    return load(folder)


def test_compiled_pipeline_is_one_that_kfp_loads(folder: Path):
    loaded = components.load_component_from_file(str(folder / "training_pipeline.yaml"))
    assert loaded.component_spec.inputs["overrides"].type == "List"
    assert {k for k, v in loaded.component_spec.inputs.items() if not v.optional} == {"data", "repository", "triton"}
    loaded = components.load_component_from_file(str(folder / "retraining_pipeline.yaml"))
    required = {k for k, v in loaded.component_spec.inputs.items() if not v.optional}
    assert required == {"source", "state", "base", "repository", "registry", "triton"}


def test_compiled_steps_have_images_resources_and_endpoint(compiled):
    executors = {k: v["container"] for k, v in compiled[0]["deploymentSpec"]["executors"].items()}
    on_gpu = {"exec-train", "exec-train-2", "exec-evaluate", "exec-evaluate-2"}
    on_tools = {f"exec-{step}" for step in ("fingerprint", "split", "gate", "deploy", "record", "report")}
    assert set(executors) == on_gpu | on_tools | {"exec-export"}
    assert {k for k, v in executors.items() if v["image"] == "r.example/train:1"} == on_gpu | {"exec-export"}
    assert {k for k, v in executors.items() if "accelerator" in v["resources"]} == on_gpu
    resources = executors["exec-train"]["resources"]
    assert resources["accelerator"]["resourceType"] == "amd.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "2"
    assert (resources["resourceMemoryLimit"], resources["resourceCpuLimit"]) == ("48Gi", "12")
    for executor in executors.values():
        environment = {e["name"]: e["value"] for e in executor["env"]}
        assert environment == {
            **{"AWS_ENDPOINT_URL_S3": "http://s3.example:8333", "AWS_DEFAULT_REGION": "eu-central-1"},
            "SOFTTEACHER_IMAGE": executor["image"],
        }
    assert not any("pip install" in part for v in executors.values() for part in v["command"])


def test_compiled_steps_have_nodes_shared_memory_and_secret(compiled):
    executors = compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    training = executors["exec-train-2"]
    assert training["nodeSelector"] == {"labels": {"pool": "gpu"}}
    assert training["tolerations"] == [
        {"key": "amd.com/gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]
    cache, shared = training["emptyDirMounts"]
    assert (shared["medium"], shared["mountPath"], shared["sizeLimit"]) == ("Memory", "/dev/shm", "16Gi")
    assert "HOME=/tmp " in (ROOT / "images" / "train.Dockerfile").read_text()
    assert (cache.get("medium"), cache["mountPath"], cache["sizeLimit"]) == (None, "/tmp/.cache", "40Gi")
    assert executors["exec-export"]["emptyDirMounts"] == [cache, shared]
    assert not {"nodeSelector", "emptyDirMounts"} & executors["exec-gate"].keys()
    for executor in executors.values():
        # of the pod's own label: KFP replaces no placeholder in an environment
        run = {"name": "SOFTTEACHER_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        assert executor["fieldPathAsEnv"] == [run]
        assert [secret["secretName"] for secret in executor["imagePullSecret"]] == ["registry"]
        keys, token = executor["secretAsEnv"]
        assert (keys["secretName"], token["secretName"]) == ("s3-keys", "s3-keys")
        assert [k["envVar"] for k in keys["keyToEnv"]] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
        assert [k["envVar"] for k in token["keyToEnv"]] == ["AWS_SESSION_TOKEN"]
        assert (keys.get("optional", False), token["optional"]) == (False, True)


def steps(document: dict) -> dict[str, dict]:
    """The tasks that are no group of tasks."""
    groups = ("comp-condition", "comp-exit-handler", "comp-for-loop")
    return {name: t for name, t in tasks(document).items() if not t["componentRef"]["name"].startswith(groups)}


def test_compiled_steps_retry_with_backoff(compiled, tmp_path: Path, capsys):
    """For as long as a run may take: in Argo the last number counts from the start of the first try."""
    assert len(steps(compiled[0])) == 11
    policy = {"maxRetryCount": 3, "backoffDuration": "60s", "backoffFactor": 2.0, "backoffMaxDuration": "2592000s"}
    assert [task["retryPolicy"] for task in steps(compiled[0]).values()] == [policy] * 11
    run(capsys, "compile", "--out", tmp_path, "--run-timeout", 1000)
    longer = steps(load(tmp_path)[0])["train"]["retryPolicy"]["backoffMaxDuration"]
    assert longer == "3600000s"


@pytest.mark.parametrize(("flag", "cached"), [([], {"split"}), (["--no-cache"], set())])
def test_only_split_is_cached_and_by_a_fingerprint_of_the_data_that_is_always_taken_anew(
    tmp_path: Path, capsys, flag, cached
):
    run(capsys, "compile", "--out", tmp_path, *flag)
    document, _ = load(tmp_path)
    assert {name for name, task in steps(document).items() if task["cachingOptions"].get("enableCache")} == cached
    given = steps(document)["split"]["inputs"]["parameters"]
    assert given["fingerprint"]["taskOutputParameter"]["producerTask"] == "fingerprint"


def test_compiled_pipeline_reports_its_end(tmp_path: Path, capsys):
    options = ["--webhook-secret", "chat", "--kfp-ui", "https://kfp.example/pipeline", "--s3-secret", "s3-keys"]
    run(capsys, "compile", "--out", tmp_path, *options)
    document, platform = load(tmp_path)
    [group, report] = document["root"]["dag"]["tasks"].values()  # all other steps are in the group
    assert report["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    status = report["inputs"]["parameters"].pop("status")
    assert status == {"taskFinalStatus": {"producerTask": group["taskInfo"]["name"]}}
    api, ui = "http://ml-pipeline.kubeflow:8888", "https://kfp.example/pipeline"
    named = {"pipeline": "training-pipeline", "run": "{{$.pipeline_job_uuid}}", "kfp_api": api, "kfp_ui": ui}
    assert constants(report) == named
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-report"]
    secrets = {secret["secretName"]: secret["keyToEnv"] for secret in executor["secretAsEnv"]}
    assert secrets["chat"] == [{"secretKey": "url", "envVar": "SOFTTEACHER_WEBHOOK"}]
    assert executor["podMetadata"]["labels"] == {"access-ml-pipeline": "true"}


def test_compiled_pipeline_has_deadlines_and_a_root(tmp_path: Path, capsys):
    options = ["--step-timeout", 1.5, "--run-timeout", 48, "--pipeline-root", "s3://artifacts/kfp"]
    run(capsys, "compile", "--out", tmp_path, *options)
    document, platform = load(tmp_path)
    assert document["defaultPipelineRoot"] == "s3://artifacts/kfp"
    kubernetes = platform["platforms"]["kubernetes"]
    assert kubernetes["pipelineConfig"] == {"activeDeadlineSeconds": 48 * 3600}
    executors = kubernetes["deploymentSpec"]["executors"]
    # a training may take days
    assert {name for name, e in executors.items() if "activeDeadlineSeconds" not in e} == {"exec-train", "exec-train-2"}
    assert {e.get("activeDeadlineSeconds", "5400") for e in executors.values()} == {"5400"}
    run(capsys, "compile", "--out", tmp_path, "--step-timeout", 0)
    assert "eadline" not in (tmp_path / "training_pipeline.yaml").read_text()


def test_the_same_options_compile_to_the_same_bytes(folder: Path, tmp_path: Path, capsys):
    run(capsys, "compile", "--out", tmp_path, *OPTIONS.split())
    one, two = (at / "training_pipeline.yaml" for at in (folder, tmp_path))
    assert one.read_bytes() == two.read_bytes()


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
    document, _ = load(tmp_path)
    for name in ("train", "train-baseline"):
        given = constants(tasks(document)[name])
        # KFP replaces the placeholder of the run's id only where it is the whole value
        assert given["run"] == "{{$.pipeline_job_uuid}}"
        assert (given["checkpoints"], given["name"], given["processes"]) == ("s3://b/checkpoints", name, 4)
    executors = document["deploymentSpec"]["executors"]
    counts = {
        k: v["container"]["resources"]["accelerator"]["resourceCount"]
        for k, v in executors.items()
        if "accelerator" in v["container"].get("resources", {})
    }
    assert counts == {"exec-train": "4", "exec-train-2": "4", "exec-evaluate": "1", "exec-evaluate-2": "1"}


def test_compiled_training_on_many_nodes(tmp_path: Path, capsys):
    options = ["--gpus", 8, "--nodes", 2, "--checkpoints", "s3://b/checkpoints", "--s3-secret", "s3-keys"]
    options += ["--train-image", "r.example/train:1", "--tools-image", "r.example/tools:1", "--shm", "64Gi"]
    options += ["--node-selector", "pool=gpu", "--toleration", "spot:NoExecute", "--image-pull-secret", "registry"]
    options += ["--run-timeout", 48]
    code, _, err = run(capsys, "compile", "--out", tmp_path, *options)
    assert (code, err) == (0, "")
    components.load_component_from_file(str(tmp_path / "training_pipeline.yaml"))
    document, platform = load(tmp_path)
    for name, suffix in (("train", ""), ("train-baseline", "-2")):
        given = constants(tasks(document)[name])
        assert (given["nodes"], given["processes"], given["shm"]) == (2, 8, "64Gi")
        assert given["image"] == "r.example/train:1"
        assert (given["deadline"], given["pull_secrets"]) == (48 * 3600, ["registry"])
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
        # what trains is the image of the nodes, which get the environment
        assert {"name": "SOFTTEACHER_IMAGE", "value": "r.example/train:1"} in container["env"]
        executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-train-nodes{suffix}"]
        assert executor["nodeSelector"] == {"labels": {"pool": "gpu"}}
        assert {secret["secretName"] for secret in executor["secretAsEnv"]} == {"s3-keys"}
        fields = {variable["name"]: variable["fieldPath"] for variable in executor["fieldPathAsEnv"]}
        assert fields == {"SOFTTEACHER_POD": "metadata.name", "SOFTTEACHER_POD_UID": "metadata.uid"}
        assert "emptyDirMounts" not in executor  # KFP would mount it here, not on the nodes


def test_compiled_evaluation_in_shards(tmp_path: Path, capsys):
    code, _, err = run(capsys, "compile", "--out", tmp_path, "--shards", 3, "--gpus", 4)
    assert (code, err) == (0, "")
    components.load_component_from_file(str(tmp_path / "training_pipeline.yaml"))
    document, _ = load(tmp_path)
    executors = document["deploymentSpec"]["executors"]
    for name, suffix in (("evaluate", ""), ("evaluate-baseline", "-2")):
        looks = tasks(document)[f"{name} shards"]
        assert looks["parameterIterator"]["items"] == {"raw": "[1, 2, 3]"}
        [shard] = document["components"][looks["componentRef"]["name"]]["dag"]["tasks"].values()
        assert constants(shard) == {"of": 3}
        joined = tasks(document)[name]
        assert joined["componentRef"]["name"] == f"comp-join-evaluation{suffix}"
        assert joined["inputs"]["artifacts"]["parts"]["taskOutputArtifact"] == {
            "producerTask": next(t for t in joined["dependentTasks"] if t.startswith("for-loop")),
            "outputArtifactKey": "pipelinechannel--evaluate-shard" + suffix + "-part",
        }
        # each looks with an accelerator of its own; the scores need none
        resources = executors[f"exec-evaluate-shard{suffix}"]["container"]["resources"]
        assert resources["accelerator"]["resourceCount"] == "1"
        assert "accelerator" not in executors[f"exec-join-evaluation{suffix}"]["container"]["resources"]


def ancestors(document: dict, name: str) -> set[str]:
    """What has to succeed before a task starts: tasks and conditions by their shown names."""

    def walk(dag: dict, before: set[str]) -> set[str] | None:
        for task in dag["tasks"].values():
            needed, waits = set(before), list(task.get("dependentTasks", []))
            while waits:
                other = dag["tasks"][waits.pop()]
                needed.add(other["taskInfo"]["name"])
                waits += other.get("dependentTasks", [])
            if task["taskInfo"]["name"] == name:
                return needed
            inner = document["components"][task["componentRef"]["name"]].get("dag")
            if inner and (found := walk(inner, needed | {task["taskInfo"]["name"]})):
                return found
        return None

    found = walk(document["root"]["dag"], set())
    assert found is not None
    return {step for step in found if not step.startswith(("condition-", "exit-handler-", "for-loop-"))}


@pytest.mark.parametrize(
    ("shards", "looks", "scores"), [(1, set(), set()), (4, {"plan-collect", "shards"}, {"evaluate shards"})]
)
def test_state_moves_when_all_else_has_succeeded(tmp_path: Path, capsys, shards, looks, scores):
    run(capsys, "compile", "--out", tmp_path, "--shards", shards)
    document, _ = load(tmp_path, "retraining")
    components.load_component_from_file(str(tmp_path / "retraining_pipeline.yaml"))
    collected = {"collect", *looks}
    trained = {*collected, *scores, "enough is new", "champion", "train", "evaluate", "export", "gate"}
    accepted = {*trained, "better than the champion", "deploy", "record"}
    assert ancestors(document, "commit-accepted") == accepted
    assert ancestors(document, "commit-rejected") == {*trained, "not better"}
    assert ancestors(document, "commit-nothing") == {*collected, "too little is new"}
    every = steps(document)
    assert [constants(every[f"commit-{verdict}"])["accepted"] for verdict in ("accepted", "rejected", "nothing")] == [
        *(True, False, False)
    ]
    assert not any(task["cachingOptions"].get("enableCache") for task in every.values())  # it lists what has arrived
    if shards > 1:
        assert constants(every["plan-collect"])["shards"] == 4


@pytest.mark.parametrize("checkpoints", [[], ["--checkpoints", "/mnt/checkpoints"]])
def test_many_nodes_need_a_prefix_on_s3(tmp_path: Path, capsys, checkpoints):
    code, _, err = run(capsys, "compile", "--out", tmp_path, "--nodes", 2, *checkpoints)
    assert (code, err.count("\n")) == (2, 1)
    assert "add --checkpoints s3://bucket/prefix" in err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--node-selector", "gpu"), ("--toleration", "gpu"), ("--toleration", "gpu:Never"), ("--memory", "lots")],
        *[
            ("--gpus", "-1"),
            ("--shards", "0"),
            ("--retries", "-1"),
            ("--step-timeout", "nan"),
            ("--run-timeout", "inf"),
        ],
        ("--checkpoints", "models/checkpoints"),
        ("--pipeline-root", "bucket/kfp"),
        ("--image-pull-secret", " "),
    ],
)
def test_compile_refuses_in_one_line(tmp_path: Path, capsys, flag, value):
    code, _, err = run(capsys, "compile", "--out", tmp_path, flag, value)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert flag in err or flag == "--memory"
    assert not (tmp_path / "training_pipeline.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.iteration=5"], "did you mean training.iterations?"),
        (["--method", "teacher"], "method.name"),
        (["--percent", "0"], "--percent 0"),
    ],
)
def test_settings_are_checked_before_a_step_starts(capsys, arguments, message):
    code, out, err = run(capsys, "run-local", "training", *REQUIRED, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(("option", "value"), [("--new-share", "1.5"), ("--canary", "1"), ("--method", "teacher")])
def test_a_retraining_is_checked_before_a_step_starts(capsys, option, value):
    code, out, err = run(capsys, "run-local", "retraining", *ARRIVALS, option, value)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert value in err


COMMANDS = ["compile", "run-local training", "submit training", "schedule training", "unschedule", "list", "status"]
COMMANDS += ["run-local retraining", "submit retraining", "schedule retraining"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"Example: python pipeline.py {command}" in " ".join(out.split())


def test_help_says_what_the_pipeline_says_of_its_parameters(capsys):
    out = {c: " ".join(run(capsys, c, "training", "--help")[1].split()) for c in ("run-local", "submit", "schedule")}
    for text in out.values():
        assert "Folder or s3:// prefix with images/ and annotations/, or a COCO json [required]" in text
        assert "--set <list[str]>" in text
    # Triton on this machine has the python backend only
    assert "[default: python]" in out["run-local"]
    assert "[default: onnxruntime]" in out["submit"]
