"""How a run ended, in one line and, if there is a webhook, as a message."""

import json

import urllib3

from components.steps import Step, failed_steps
from softteacher.errors import UserError

# KFP's states have had two sets of names
GOOD = {"SUCCEEDED", "COMPLETE", "CACHED"}
TIMEOUT = urllib3.Timeout(10.0)


def tell_ending(
    state: str, message: str, pipeline: str, run: str, *, kfp_api: str, kfp_ui: str, webhook: str = ""
) -> str:
    """Print how a run ended, and post it.

    Never fails itself: neither an API that can't be asked nor a webhook that is down makes a good run a bad one.

    Args:
        state: What KFP says of all steps together.
        message: What it says about the failure; older servers say nothing.
        pipeline: Name of the pipeline.
        run: Id of the run.
        kfp_api: URL of KFP's API inside the cluster; empty: the step that failed is not asked for.
        kfp_ui: URL of KFP's pages; empty: the place of the log is given without it.
        webhook: URL that takes JSON: `text` (as chat servers want it), `pipeline`, `run`, `state`, `steps`, `link`.

    Returns:
        The line.
    """
    link = f"{kfp_ui.rstrip('/')}/#/runs/details/{run}" if kfp_api else ""
    where = f"; its log: {link}" if link else "; its log is above"
    failed: list[Step] = []
    if state in GOOD:
        line = f"{pipeline}: run {run} succeeded"
    else:
        try:
            failed = failed_steps(kfp_api, run) if kfp_api else []
        except UserError as error:
            print(f"which step failed is not known: {error}", flush=True)
        if failed:
            what = "; ".join(f"step {step.name}" + (f": {step.message}" if step.message else "") for step in failed)
            line = f"{pipeline}: run {run} failed: {what}{where}"
        else:
            line = (
                f"{pipeline}: run {run} ended as {state}"
                + (f": {' '.join(message.split())}" if message else "")
                + where
            )
    print(line, flush=True)
    if webhook:
        body = {"text": line, "pipeline": pipeline, "run": run, "state": state, "link": link}
        body["steps"] = [step.name for step in failed]
        try:
            answer = urllib3.request("POST", webhook, json=body, timeout=TIMEOUT, retries=False)
            complaint = f"it answered {answer.status}" if answer.status >= 400 else ""
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            complaint = type(error).__name__  # its text would name the URL, which is a secret
        if complaint:
            print(f"warning: the webhook was not told: {complaint}; check the secret's key `url`", flush=True)
    print(json.dumps({"step": "report", "state": state, "failed": [step.name for step in failed]}), flush=True)
    return line
