"""A run of a pipeline on this machine, each step in a process or a container of its own."""

import contextlib
import io
import json
import logging
import os
import pydoc
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict
from kfp import local
from kfp.dsl.graph_component import GraphComponent

from components.containers import docker_runner
from softteacher import storage
from softteacher.choices import Runner
from softteacher.errors import UserError


class StepLog(io.TextIOBase):
    """The output of a local run: each step's own lines without KFP's, and how long each step took.

    Attributes:
        names: What to call each step, by its name in KFP.
        wrote: Whether a step, by its name in KFP, has written its outputs. One that has not has failed, whatever KFP
            says: it takes a container that is gone before it is asked for its exit code for a success.
        seconds: Wall time of each step that ended.
        failed: The first step that failed.
        reason: Its `UserError`, if it was one. The traceback of any other exception is passed on.
    """

    def __init__(self, out: TextIO, names: dict[str, str], wrote: Callable[[str], bool]) -> None:
        self.names = names
        self.wrote = wrote
        self.seconds: dict[str, float] = {}
        self.failed: str | None = None
        self.reason: str | None = None
        self._out = out
        self._rest = self._until = ""
        self._traceback: list[str] = []

    def write(self, text: str) -> int:
        """Take what KFP and the steps print; KFP indents the steps' lines by four spaces."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(re.sub(r"\x1b\[[0-9;]*m", "", line))
        return len(text)

    def _line(self, line: str) -> None:
        if self._traceback and re.match(r"    (\s|$|Traceback |The above |During |[\w.]+(: |$))", line):
            self._traceback.append(line)
            return
        self._end_of_traceback()
        if self._until:  # inside a block that KFP prints
            self._until = "" if line.startswith(self._until) else self._until
        elif found := re.search(r" - INFO - Executing task '(.+)'", line):
            self._started, self._raised = time.monotonic(), None
            self._say(f"[{self.names[found[1]]}]")
        elif found := re.search(r" - Task '(.+)' finished with status (\w+)", line):
            self.seconds[found[1]] = round(time.monotonic() - self._started, 2)
            if not (self.failed or (found[2] == "SUCCESS" and self.wrote(found[1]))):
                self.failed, self.reason = self.names[found[1]], self._raised
        elif line.startswith("    Traceback "):
            self._traceback.append(line)
        elif "]: Got executor_input:" in line:
            self._until = "    }"
        elif re.search(r" - INFO - Task '.+' outputs:", line):
            self._until = "---"
        elif line.strip() and not re.search(r"^[\d:.]+ - \w+ - |^---|\[KFP Executor .* INFO\]|^    Found image ", line):
            self._say(line)

    def _end_of_traceback(self) -> None:
        raised = [found for line in self._traceback if (found := re.match(r"    ([\w.]+): (.+)", line))]
        kind = pydoc.locate(raised[-1][1]) if raised else None
        if isinstance(kind, type) and issubclass(kind, UserError):
            self._raised = raised[-1][2]
        elif self._traceback:
            self._say(*self._traceback)
        self._traceback = []

    def _say(self, *lines: str) -> None:
        self._out.write("\n".join(lines) + "\n")  # not print(): KFP replaces it while a step runs
        self._out.flush()


def run_local(
    pipeline: GraphComponent,
    parameters: dict[str, Any],
    pipeline_root: str,
    runner: Runner = "subprocess",
) -> dict[str, dict[str, Any]]:
    """Run a pipeline on this machine.

    Args:
        pipeline: built for no cluster.
        parameters: Of the pipeline.
        pipeline_root: Folder for what the steps write.
        runner: What each step runs in: a process, or a container of its image.

    Returns:
        For each step that ran: its outputs (an artifact's path, or its metrics; a parameter's value) and `seconds`.

    Raises:
        UserError: a step's input was bad, or the runner can't run here.
        RuntimeError: a step failed otherwise; its output has been printed.
    """
    spec = pipeline.pipeline_spec
    dags = [spec.root.dag, *(component.dag for component in spec.components.values())]
    tasks = [task for dag in dags for task in dag.tasks.values()]
    names = {task.component_ref.name.removeprefix("comp-"): task.task_info.name for task in tasks}
    if storage.is_s3(pipeline_root):
        raise UserError(f"--pipeline-root {pipeline_root}: the steps write to this machine; choose a local folder")
    root = Path(pipeline_root).absolute()
    earlier = set(root.glob(f"{pipeline.name}-*"))

    def written(step: str) -> Path:  # the run's folder is made by the first step that writes
        run = next((folder for folder in root.glob(f"{pipeline.name}-*") if folder not in earlier), root / "none")
        return run / step / "executor_output.json"

    log = StepLog(sys.stdout, names, lambda step: written(step).is_file())
    if runner == "docker":
        executors = MessageToDict(spec)["deploymentSpec"]["executors"].values()
        chosen = docker_runner(root, {executor["container"]["image"] for executor in executors})
    else:
        if " " in sys.executable or "python3" in f"{root} {parameters}":
            # KFP puts the interpreter's path into a shell script unquoted, in place of every "python3" of the command
            raise UserError(
                "the local runner can't have a space in the interpreter's path or 'python3' in other paths; "
                f"move {sys.executable} or {root}"
            )
        chosen = contextlib.nullcontext(local.SubprocessRunner(use_venv=False))
    os.environ["PYTHONUNBUFFERED"] = "1"  # progress is seen as it happens
    logging.getLogger().addHandler(logging.NullHandler())  # else KFP's warnings about skipped branches go to stderr
    error = None
    with chosen as ready, warnings.catch_warnings(), contextlib.redirect_stdout(log):
        warnings.simplefilter("ignore")
        local.init(ready, pipeline_root=str(root))
        try:
            pipeline(**parameters)
        except RuntimeError as e:
            error = e
        except Exception as e:  # KFP stumbles over the outputs that are missing
            if not log.failed:
                raise
            error = e
    if log.reason:
        raise UserError(f"step {log.failed}: {log.reason}") from error
    if log.failed or error:
        raise RuntimeError(f"step {log.failed} failed; its output is above" if log.failed else error) from error
    outputs = {}
    for step, seconds in log.seconds.items():
        wrote = json.loads(written(step).read_text())
        artifacts = {key: value["artifacts"][0] for key, value in wrote.get("artifacts", {}).items()}
        # Metrics have no file
        shown = {key: a["uri"] if Path(a["uri"]).exists() else a["metadata"] for key, a in artifacts.items()}
        outputs[names[step]] = {**shown, **wrote.get("parameterValues", {}), "seconds": seconds}
    return outputs
