"""How a run ended: the line, the message to a webhook, and the step itself in KFP's own runner."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from components import steps
from components.ending import tell_ending
from tests.components.kfp_server import KfpServer, Refusal

ROOT = Path(__file__).parents[2]
FAILED_RUN = {
    "display_name": "a run",
    "experiment_id": "e",
    "run_details": {
        "task_details": [
            {"task_id": "1", "display_name": "split", "state": "SUCCEEDED"},
            {"task_id": "2", "display_name": "train", "state": "FAILED", "error": {"message": "out of\nmemory"}},
            {"task_id": "3", "display_name": "report", "state": "RUNNING"},
        ]
    },
}


@pytest.fixture
def kfp() -> Iterator[KfpServer]:
    with KfpServer() as server:
        server.runs["r1"] = FAILED_RUN | {"run_id": "r1"}
        yield server


@pytest.fixture
def webhook() -> Iterator[HTTPServer]:
    """A webhook; `posted` has what came, `code` is what it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(server.code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.posted, server.code = [], 200
        server.url = f"http://127.0.0.1:{server.server_port}/secret-path"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def tell(state: str, message: str = "", api: str = "", ui: str = "", webhook: str = "") -> str:
    return tell_ending(state, message, "training-pipeline", "r1", kfp_api=api, kfp_ui=ui, webhook=webhook)


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE"])
def test_success(capsys, state):
    assert tell(state) == "training-pipeline: run r1 succeeded"
    assert capsys.readouterr().out.startswith("training-pipeline: run r1 succeeded\n")


def test_failure_names_the_step_and_the_place_of_the_log(kfp: KfpServer):
    line = tell("FAILED", api=kfp.url, ui="https://kfp.example/pipeline/")
    link = "https://kfp.example/pipeline/#/runs/details/r1"
    assert line == f"training-pipeline: run r1 failed: step train: out of memory; its log: {link}"


def test_failure_on_this_machine():
    line = tell("FAILED", "Task exit-handler-1 failed.")
    assert line == "training-pipeline: run r1 ended as FAILED: Task exit-handler-1 failed.; its log is above"


def test_a_pod_of_a_multi_user_kubeflow_shows_its_token(tmp_path: Path, monkeypatch):
    with KfpServer(multi_user=True, token="of-the-pod") as kfp:
        kfp.runs["r1"] = FAILED_RUN | {"run_id": "r1"}
        assert "step train" not in tell("FAILED", api=kfp.url)
        monkeypatch.setattr(steps, "TOKEN", tmp_path / "token")
        steps.TOKEN.write_text("of-the-pod")
        assert "step train" in tell("FAILED", api=kfp.url)


@pytest.mark.parametrize("refusal", [Refusal(403, "may not"), Refusal(500, "database"), None])
def test_an_api_that_cannot_be_asked(kfp: KfpServer, capsys, refusal):
    kfp.refusals = {"GET ": refusal} if refusal else {}
    line = tell("FAILED", "the reason", api=kfp.url if refusal else "http://127.0.0.1:9")
    assert line == "training-pipeline: run r1 ended as FAILED: the reason; its log: /#/runs/details/r1"
    assert "which step failed is not known: KFP's API " in capsys.readouterr().out


def test_webhook(kfp: KfpServer, webhook, capsys):
    line = tell("FAILED", api=kfp.url, webhook=webhook.url)
    [posted] = webhook.posted
    assert posted["text"] == line
    assert (posted["run"], posted["state"], posted["steps"]) == ("r1", "FAILED", ["train"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["train"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret-path", "secret-path", None])
def test_a_webhook_that_fails_is_no_failure_and_stays_secret(webhook, capsys, url):
    webhook.code = 404
    tell("SUCCEEDED", webhook=url or webhook.url)
    out = capsys.readouterr().out
    assert "warning: the webhook was not told" in out
    assert "secret-path" not in out


SCRIPT = """
import sys
from kfp import dsl, local
from components.report import report

@dsl.component(install_kfp_package=False, base_image="python:3.11")
def step(good: bool):
    assert good

@dsl.pipeline
def pipeline(good: bool, api: str):
    with dsl.ExitHandler(report(pipeline="p", run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, kfp_api=api, kfp_ui="")):
        step(good=good)

local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1])
pipeline(good=sys.argv[2] == "good", api=sys.argv[3])
"""


@pytest.mark.parametrize("state", ["good", "bad"])
def test_the_step_in_kfps_runner_is_told_the_state_and_asks_the_api(kfp: KfpServer, webhook, tmp_path: Path, state):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTTEACHER_WEBHOOK": webhook.url}
    command = [sys.executable, "-W", "ignore", str(tmp_path / "run.py"), str(tmp_path / "out"), state, kfp.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (state == "bad")
    [posted] = webhook.posted
    assert posted["state"] == ("SUCCEEDED" if state == "good" else "FAILED")
    assert [path for _, path, *_ in kfp.asked] == ([f"/apis/v2beta1/runs/{posted['run']}"] if state == "bad" else [])
    assert (" succeeded" if state == "good" else " ended as FAILED") in done.stdout
