"""Compiled pipelines submitted, scheduled and looked at, through `kfp.Client` and its published API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp import compiler

import pipeline
from components.cluster import ClusterOptions
from components.server import Server
from softteacher.errors import UserError
from tests.components.kfp_server import KfpServer, Refusal
from tests.test_pipeline import ARRIVALS, REQUIRED, run

CRON = ["--cron", "0 3 * * MON"]


@pytest.fixture
def kfp() -> Iterator[KfpServer]:
    with KfpServer() as server:
        yield server


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("compiled") / "training_pipeline.yaml"
    compiler.Compiler().compile(pipeline.build_training_pipeline(ClusterOptions()), str(file))
    return file


def start(capsys, command: str, package: Path, host: str, *options: object) -> tuple[int, str, str]:
    return run(capsys, command, "training", package, "--host", host, *REQUIRED, *options)


def test_submit(kfp: KfpServer, package: Path, capsys):
    options = ["--experiment", "cards", "--baseline", "--set", "training.seed=7", "--service-account", "steps"]
    code, out, err = start(capsys, "submit", package, kfp.url + "/", *options)
    assert (code, err) == (0, "")
    [started] = kfp.runs.values()
    assert out == f"{kfp.url}/#/runs/details/{started['run_id']}\n"
    assert kfp.experiments[started["experiment_id"]]["display_name"] == "cards"
    assert started["service_account"] == "steps"
    parameters = started["runtime_config"]["parameters"]
    assert parameters["data"] == "s3://data/cards"
    assert parameters["baseline"] is True
    assert parameters["overrides"] == ["training.seed=7"]
    assert parameters["triton_backend"] == "onnxruntime"
    [uploaded] = kfp.uploads.values()
    assert uploaded["pipelineInfo"]["name"] == "training-pipeline"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--triton-engine", "openvino-bf16"], "can't run it; --triton-backend openvino"),
        (
            ["--triton-engine", "openvino-int8", "--triton-backend", "python"],
            "export must measure it; --set 'export.",
        ),
        (["--triton-engine", "openvino-bf16", "--triton-backend", "python", "--triton-gpu"], "does not run on GPUs"),
        (["--name", "cards.v2"], "--name cards.v2: only letters, digits, - and _"),
        (["--name", "cards-canary"], "--name cards-canary: names with that ending are taken"),
        (["--gate-delta", "nan"], "--gate-delta nan: must be a finite number"),
        (["--registry", "s3://models/triton/registry"], "is in Triton's repository"),
        (["--unlabeled", "stream"], "--unlabeled stream: no pod sees it; write s3://bucket/prefix"),
    ],
)
def test_what_a_step_would_refuse_after_hours_is_refused_now(kfp: KfpServer, package: Path, capsys, options, message):
    code, _, err = start(capsys, "submit", package, kfp.url, *options)
    assert code == 2
    assert err.startswith("error: --")
    assert message in err
    assert not kfp.runs


def test_submit_twice_uploads_once(kfp: KfpServer, package: Path, capsys, tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text(package.read_text() + "# changed\n")
    for file in (package, package, other, other, package):
        assert start(capsys, "submit", file, kfp.url)[0] == 0
    assert [len(s) for s in (kfp.pipelines, kfp.versions, kfp.experiments, kfp.runs)] == [1, 2, 1, 5]
    used = [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs.values()]
    assert [used[0] == one for one in used] == [True, True, False, False, True]


def test_pages_are_turned(kfp: KfpServer, package: Path, capsys, tmp_path: Path):
    for n in (*range(5), 4):  # the server gives two a page
        file = tmp_path / f"{n}.yaml"
        file.write_text(package.read_text() + f"# {n}\n")
        assert start(capsys, "schedule", file, kfp.url, *CRON, "--job", f"job-{n}")[0] == 0
    assert (len(kfp.versions), len(kfp.jobs)) == (5, 5)


def test_a_pipeline_that_somebody_else_uploads_just_now(kfp: KfpServer, package: Path, capsys, monkeypatch):
    find = Server._find_version
    monkeypatch.setattr(Server, "_find_version", lambda *a: None if not kfp.versions else find(*a))
    upload = kfp.answer

    def twice(method, path, query, body):
        if path == "/pipelines/upload_version":
            upload(method, path, query, body)  # the other one's
        return upload(method, path, query, body)

    kfp.answer = twice
    assert start(capsys, "submit", package, kfp.url)[0] == 0
    assert (len(kfp.versions), len(kfp.runs)) == (1, 1)


def test_schedule(kfp: KfpServer, package: Path, capsys):
    code, out, err = start(capsys, "schedule", package, kfp.url, *CRON, "--name", "cards")
    assert (code, err) == (0, "")
    assert out.startswith("training-pipeline-cards: created; next run 20")
    [job] = kfp.jobs.values()
    assert job["display_name"] == "training-pipeline-cards"
    assert job["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * MON"}}
    assert (job["max_concurrency"], job["no_catchup"], job["mode"]) == ("1", True, "ENABLE")
    assert job["pipeline_version_reference"]["pipeline_version_id"] in kfp.versions
    assert job["runtime_config"]["parameters"]["name"] == "cards"


def test_schedule_of_the_retraining(kfp: KfpServer, capsys, tmp_path: Path):
    assert run(capsys, "compile", "--out", tmp_path)[0] == 0
    options = [*ARRIVALS, "--labels", "s3://data/labels", *CRON]
    where = [tmp_path / "retraining_pipeline.yaml", "--host", kfp.url]
    code, out, err = run(capsys, "schedule", "retraining", *where, *options)
    assert (code, err) == (0, "")
    assert out.startswith("retraining-pipeline-detector: created; next run 20")
    [job] = kfp.jobs.values()
    parameters = job["runtime_config"]["parameters"]
    assert (parameters["labels"], parameters["min_new"], parameters["canary"]) == (["s3://data/labels"], 100, 0)
    assert (job["max_concurrency"], job["no_catchup"]) == ("1", True)  # one round at a time
    assert "unchanged" in run(capsys, "schedule", "retraining", *where, *options)[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ([], "unchanged"),
        (["--cron", "0 4 * * MON"], "replaced"),
        (["--percent", "5"], "replaced"),
        (["--experiment", "other"], "replaced"),
        (["--service-account", "steps"], "replaced"),
    ],
)
def test_schedule_again(kfp: KfpServer, package: Path, capsys, change, word):
    start(capsys, "schedule", package, kfp.url, *CRON)
    [before] = kfp.jobs
    code, out, _ = start(capsys, "schedule", package, kfp.url, *CRON, *change)
    assert (code, word in out) == (0, True)
    [after] = kfp.jobs  # never two of a name
    assert (before == after) is (word == "unchanged")
    assert set(policies(kfp)) == (set() if before == after else {"ORPHAN"})


def policies(kfp: KfpServer) -> list[str | None]:
    """What is to become of the runs of each schedule that was deleted; by default Kubernetes deletes them, too."""
    return [query.get("propagation_policy") for method, _, query, _ in kfp.asked if method == "delete"]


def test_schedule_of_a_pipeline_that_has_changed_runs_the_new_one(kfp: KfpServer, package: Path, capsys, tmp_path):
    start(capsys, "schedule", package, kfp.url, *CRON)
    changed = tmp_path / "changed.yaml"
    changed.write_text(package.read_text() + "# changed\n")
    assert "replaced" in start(capsys, "schedule", changed, kfp.url, *CRON)[1]
    [job] = kfp.jobs.values()
    newest = max(kfp.versions.values(), key=lambda version: version["created_at"])
    assert job["pipeline_version_reference"]["pipeline_version_id"] == newest["pipeline_version_id"]


def test_schedule_that_was_disabled_or_left_behind_by_a_killed_command(kfp: KfpServer, package: Path, capsys):
    start(capsys, "schedule", package, kfp.url, *CRON)
    [job] = kfp.jobs.values()
    job["status"] = "DISABLED"
    kfp.jobs["old"] = job | {"recurring_run_id": "old", "runtime_config": {"parameters": {}}}
    assert "enabled" in start(capsys, "schedule", package, kfp.url, *CRON)[1]
    assert list(kfp.jobs.values()) == [job]
    assert job["status"] == "ENABLED"


def test_schedule_that_is_refused_leaves_the_old_one(kfp: KfpServer, package: Path, capsys):
    start(capsys, "schedule", package, kfp.url, *CRON)
    before = dict(kfp.jobs)
    kfp.refusals["POST /apis/v2beta1/recurringruns"] = Refusal(500, "database is locked")
    code, _, err = start(capsys, "schedule", package, kfp.url, "--cron", "@daily")
    assert (code, err) == (2, f"error: --host {kfp.url}: refused the schedule (500 database is locked)\n")
    assert kfp.jobs == before


def test_unschedule(kfp: KfpServer, package: Path, capsys):
    for job in ("one", "two"):
        start(capsys, "schedule", package, kfp.url, *CRON, "--job", job)
    assert run(capsys, "unschedule", "one", "--host", kfp.url) == (0, "one: removed\n", "")
    assert run(capsys, "unschedule", "one", "--host", kfp.url) == (0, "one: there is no such schedule\n", "")
    assert [job["display_name"] for job in kfp.jobs.values()] == ["two"]
    assert policies(kfp) == ["ORPHAN"]


def test_list(kfp: KfpServer, package: Path, capsys):
    start(capsys, "schedule", package, kfp.url, *CRON, "--job", "weekly")
    start(capsys, "submit", package, kfp.url)
    [started] = kfp.runs.values()
    code, out, _ = run(capsys, "list", "--host", kfp.url)
    assert code == 0
    schedule, ran = out.splitlines()
    assert schedule == "schedule  weekly  enabled  0 0 3 * * MON"
    assert ran.startswith(f"run  {started['run_id']}  PENDING  20")
    assert "training-pipeline 20" in ran


def detail(name: str, state: str, seconds: int, **more: object) -> dict:
    began, ended = "2026-11-26T10:00:00Z", f"2026-11-26T10:{seconds // 60:02}:{seconds % 60:02}Z"
    return {"task_id": name, "display_name": name, "state": state, "start_time": began, "end_time": ended, **more}


OUT_OF_MEMORY = {"code": 2, "message": "out of\nmemory"}
# of servers that tell what the workflow engine knows: children are pods, or what follows
ENGINE = [
    detail("root", "FAILED", 90),
    detail("root-driver", "SUCCEEDED", 3),
    detail("exit-handler-1", "FAILED", 90, child_tasks=[{"pod_name": "pod-1"}]),
    detail("split-driver", "SUCCEEDED", 5),
    detail("split", "SUCCEEDED", 12, pod_name="pod-1", child_tasks=[{"pod_name": "pod-2"}]),
    detail("condition-4", "SKIPPED", 80),
    detail("train", "FAILED", 75, pod_name="pod-2", child_tasks=[{"pod_name": "pod-7"}]),
    {**detail("executor", "FAILED", 70, pod_name="pod-7", error=OUT_OF_MEMORY), "task_id": "x"},
]
# of servers that keep the tasks themselves
NATIVE = [
    detail("exit-handler-1", "FAILED", 90),
    detail("baseline", "FAILED", 90, parent_task_id="exit-handler-1"),
    detail("train", "FAILED", 75, parent_task_id="baseline", error=OUT_OF_MEMORY),
    detail("split", "SUCCEEDED", 12, parent_task_id="exit-handler-1"),
    {"task_id": "e", "display_name": "evaluate", "parent_task_id": "exit-handler-1"},
]


@pytest.mark.parametrize(("details", "more"), [(ENGINE, []), (NATIVE, [["evaluate", "PENDING"]])])
def test_status(kfp: KfpServer, package: Path, capsys, details, more):
    for _ in range(3):
        start(capsys, "submit", package, kfp.url)
    *_, latest = kfp.runs.values()
    assert run(capsys, "status", "--host", kfp.url)[0] == 0
    latest |= {"state": "FAILED", "run_details": {"task_details": details}, "error": {"message": "it failed"}}
    code, out, _ = run(capsys, "status", "--host", kfp.url)
    assert code == 1
    assert sorted(line.split(None, 2) for line in out.splitlines()[1:-2]) == [
        *more,
        ["split", "SUCCEEDED", "12 s"],
        ["train", "FAILED", "75 s  out of memory"],
    ]
    assert out.splitlines()[-2:] == ["it failed", f"{kfp.url}/#/runs/details/{latest['run_id']}"]
    assert run(capsys, "status", latest["run_id"], "--host", kfp.url)[1] == out


def test_status_of_nothing(kfp: KfpServer, capsys):
    assert "no runs yet" in run(capsys, "status", "--host", kfp.url)[2]
    code, _, err = run(capsys, "status", "nowhere", "--host", kfp.url)
    assert (code, err.count("\n")) == (2, 1)
    assert "has no run nowhere (404 " in err


def test_many_users(package: Path, capsys, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "a-token-that-is-secret")
    with KfpServer(multi_user=True, token="a-token-that-is-secret") as kfp:
        code, _, err = start(capsys, "submit", package, kfp.url)
        assert (code, err) == (2, f"error: --host {kfp.url}: has many users; add --namespace with yours\n")
        for namespace in ("anna", "bert", "anna"):
            for command, *more in (["submit"], ["schedule", *CRON]):
                assert start(capsys, command, package, kfp.url, "--namespace", namespace, *more)[0] == 0
        assert [len(s) for s in (kfp.pipelines, kfp.versions, kfp.experiments, kfp.jobs)] == [2, 2, 2, 2]
        assert {p["namespace"] for p in kfp.pipelines.values()} == {"anna", "bert"}
        assert len(run(capsys, "list", "--host", kfp.url, "--namespace", "anna")[1].splitlines()) == 3


def test_one_user(kfp: KfpServer, package: Path, capsys):
    code, _, err = start(capsys, "submit", package, kfp.url, "--namespace", "anna")
    assert (code, err.count("\n")) == (2, 1)
    assert "leave out --namespace" in err


@pytest.mark.parametrize("start_of_path", ["GET /apis/v2beta1/healthz", "GET /apis/v2beta1/pipelines", "POST "])
@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (Refusal(401, "no"), "asks for a login (401); give a bearer token in KFP_TOKEN"),
        (Refusal(403, "anna may not"), "check --namespace, and what the token may do there"),
        (Refusal(503, "upstream\nconnect error"), "(503 "),
    ],
)
def test_refusals_are_one_line(kfp: KfpServer, package: Path, capsys, start_of_path, refusal, message):
    kfp.refusals[start_of_path] = refusal
    code, out, err = start(capsys, "schedule", package, kfp.url, *CRON)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("option", ["--experiment", "--job"])
def test_a_name_that_is_too_long(kfp: KfpServer, package: Path, capsys, option):
    code, _, err = start(capsys, "schedule", package, kfp.url, *CRON, option, "x" * 200)
    assert (code, err.count("\n")) == (2, 1)
    assert "name length cannot exceed 128" in err


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("http://127.0.0.1:9", "no Kubeflow Pipelines there"),
        ("http://nowhere.invalid", "no Kubeflow Pipelines there"),
        ("localhost", "write a URL"),
    ],
)
def test_nobody_there(package: Path, capsys, host, message):
    for command in ("submit", "list"):
        arguments = ["training", package, *REQUIRED] if command == "submit" else []
        code, _, err = run(capsys, command, *arguments, "--host", host)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: --host {host}: ")
        assert message in err


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (404, "404 page not found", "has no API v2beta1 (404)"),
        (200, "<html>log in</html>", "does not answer as Kubeflow Pipelines does"),
        (302, "", "asks for a login"),
    ],
)
def test_something_else_there(status, text, message):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Location", "/login")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(UserError) as told:
            Server(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_packages_that_are_none(tmp_path: Path, package: Path, capsys):
    texts = {"none.yaml": None, "garbage.yaml": "a: [", "list.yaml": "- 1", "binary.yaml": "\udcff"}
    texts["other.yaml"] = package.read_text().replace("name: training-pipeline", "name: other-pipeline")
    texts["old.yaml"] = package.read_text().replace("gate_delta", "gate_epsilon")
    messages = dict.fromkeys(texts, "is no compiled pipeline") | {"none.yaml": "no such file"}
    messages |= {"other.yaml": "is of other-pipeline", "old.yaml": "is of another version of it"}
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_text(text, errors="surrogateescape")
        code, _, err = start(capsys, "submit", tmp_path / name, "http://127.0.0.1:9")
        assert (code, err.count("\n")) == (2, 1)
        assert messages[name] in err, name
