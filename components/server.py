"""A Kubeflow Pipelines server: pipelines, runs and schedules, through `kfp.Client`.

Everything that is asked for is brought about once: the same YAML is uploaded once, a schedule of the same name is
replaced. Every refusal is one line.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kfp import Client
from kfp_server_api import ApiException, V2beta1Pipeline, V2beta1PipelineVersion, V2beta1RecurringRun, V2beta1Run

from softteacher.errors import UserError

TIMEOUT = 10.0  # seconds, for the first answer
PAGE = 100


class Server:
    """A Kubeflow Pipelines server.

    Args:
        host: Its URL; on a multi-user Kubeflow it ends in /pipeline.
        namespace: Of the user, on a multi-user Kubeflow; none otherwise.
        token: Bearer token, if it asks for a login.

    Raises:
        UserError: it isn't there, refuses, is too old, or the namespace is missing or one too many.
    """

    def __init__(self, host: str, namespace: str | None = None, token: str | None = None) -> None:
        self.host = host.rstrip("/")
        self.namespace = namespace
        if not re.match(r"https?://\w", self.host):
            raise UserError(f"--host {host}: write a URL, for example http://localhost:8080")
        # its own certificates, where the usual variable names some
        certificates = os.environ.get("SSL_CERT_FILE")
        multi_user = self._ask_health(token, certificates)
        if multi_user and not namespace:
            raise UserError(f"--host {self.host}: has many users; add --namespace with yours")
        if namespace and not multi_user:
            raise UserError(f"--host {self.host}: has one user and no namespaces; leave out --namespace")
        with self.explained("refused the login"):
            self.client = Client(
                host=self.host, namespace=namespace or "kubeflow", existing_token=token, ssl_ca_cert=certificates
            )

    def _ask_health(self, token: str | None, certificates: str | None) -> bool:
        """Whether it has many users. Asked first: `kfp.Client` tries for half a minute, with a traceback each time."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{self.host}/apis/v2beta1/healthz"
        with (
            urllib3.PoolManager(timeout=TIMEOUT, retries=False, ca_certs=certificates) as pool,
            self.explained("refused"),
        ):
            answer = pool.request("GET", url, headers=headers)
            if answer.status != 200:
                raise ApiException(answer.status, answer.reason)
            return bool(dict(answer.json()).get("multi_user"))

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what can go wrong between here and the server into one line.

        Args:
            what: It did then: "refused the run".
        """
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the client prints links
                warnings.simplefilter("ignore")
                yield
        except ApiException as error:
            raise UserError(f"--host {self.host}: {_complaint(error, what)}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise UserError(
                f"--host {self.host}: no Kubeflow Pipelines there ({reason}); check the URL and the network"
            ) from None
        except (ValueError, TypeError):  # a page instead of JSON, or other JSON
            raise UserError(
                f"--host {self.host}: does not answer as Kubeflow Pipelines does; "
                "check the URL (often .../pipeline) and --token"
            ) from None

    def submit(
        self, package: Path, parameters: dict[str, Any], *, experiment: str, service_account: str | None = None
    ) -> str:
        """Upload a compiled pipeline, unless it is there, and start a run; returns the URL of the run.

        Args:
            package: YAML that `compile` wrote.
            parameters: Of the pipeline.
            experiment: Name of the experiment that the run belongs to; it is created if there is none.
            service_account: Kubernetes service account of the steps; none: the cluster's default.
        """
        version = self.upload(package)
        with self.explained("refused the run"):
            run = self.client.run_pipeline(
                self.client.create_experiment(experiment, namespace=self.namespace).experiment_id,
                f"{pipeline_name(package)} {datetime.now():%Y-%m-%d %H-%M-%S}",
                params=parameters,
                pipeline_id=version.pipeline_id,
                version_id=version.pipeline_version_id,
                service_account=service_account,
            )
        return self.link(run.run_id)

    def upload(self, package: Path) -> V2beta1PipelineVersion:
        """The version of a compiled pipeline, named by its content; it is uploaded if there is none."""
        name = pipeline_name(package)
        version = f"{name}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
        with self.explained("refused the pipeline"):
            pipeline = self._find_pipeline(name)
            if not pipeline:
                body = V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
                with _unless_there():
                    self.client.pipelines.pipeline_service_create_pipeline(pipeline=body)
                pipeline = self._find_pipeline(name)
            if not (found := self._find_version(pipeline.pipeline_id, version)):
                with _unless_there():
                    self.client.upload_pipeline_version(str(package), version, pipeline_id=pipeline.pipeline_id)
                found = self._find_version(pipeline.pipeline_id, version)
        return found

    def schedule(
        self,
        package: Path,
        parameters: dict[str, Any],
        *,
        job: str,
        cron: str,
        experiment: str,
        service_account: str | None = None,
    ) -> str:
        """Run a compiled pipeline by the clock, one run at a time, without making up for missed ones.

        Args:
            package: YAML that `compile` wrote.
            parameters: Of the pipeline.
            job: Name of the schedule. One of this name that is otherwise the same stays; any other is replaced.
            cron: KFP's six fields, see `kfp_cron`.
            experiment: Name of the experiment that the runs belong to; it is created if there is none.
            service_account: Kubernetes service account of the steps; none: the cluster's default.

        Returns:
            created, replaced, enabled or unchanged.
        """
        version = self.upload(package)
        with self.explained("refused the schedule"):
            experiment_id = self.client.create_experiment(experiment, namespace=self.namespace).experiment_id

            def wanted(found: V2beta1RecurringRun) -> bool:
                reference, by_clock = found.pipeline_version_reference, found.trigger and found.trigger.cron_schedule
                return (
                    (by_clock and by_clock.cron) == cron
                    and (reference and reference.pipeline_version_id) == version.pipeline_version_id
                    and (found.runtime_config and found.runtime_config.parameters) == parameters
                    and found.experiment_id == experiment_id
                    and (found.service_account or None) == service_account
                    and bool(found.no_catchup)
                    and int(found.max_concurrency or 0) == 1
                )

            present = list(self.schedules(job))
            same = next(filter(wanted, present), None)
            if same is None:
                self.client.create_recurring_run(
                    experiment_id,
                    job,
                    cron_expression=cron,
                    max_concurrency=1,
                    no_catchup=True,
                    params=parameters,
                    pipeline_id=version.pipeline_id,
                    version_id=version.pipeline_version_id,
                    service_account=service_account,
                )
            elif not is_enabled(same):
                self.client.enable_recurring_run(same.recurring_run_id)
            # the old ones go last: where the new one is refused, they stay
            for other in present:
                if other is not same:
                    self._delete(other)
        if same is None:
            return "replaced" if present else "created"
        return "unchanged" if is_enabled(same) else "enabled"

    def unschedule(self, job: str) -> int:
        """Delete the schedules of a name; returns how many there were. Runs go on and stay."""
        with self.explained("refused to delete the schedule"):
            found = list(self.schedules(job))
            for one in found:
                self._delete(one)
        return len(found)

    def _delete(self, job: V2beta1RecurringRun) -> None:
        # by default Kubernetes deletes what a schedule has started along with it, in the midst of a training
        delete = self.client._recurring_run_api.recurring_run_service_delete_recurring_run
        delete(job.recurring_run_id, propagation_policy="ORPHAN")

    def schedules(self, job: str | None = None) -> Iterator[V2beta1RecurringRun]:
        """All schedules, or those of a name."""
        with self.explained("refused to list schedules"):
            every = list(_pages(self.client.list_recurring_runs, "recurring_runs", namespace=self.namespace))
        yield from (one for one in every if job in (None, one.display_name))

    def runs(self, limit: int) -> list[V2beta1Run]:
        """The latest runs, newest first."""
        with self.explained("refused to list runs"):
            answer = self.client.list_runs(page_size=limit, sort_by="created_at desc", namespace=self.namespace)
        return answer.runs or []

    def run(self, run_id: str) -> V2beta1Run:
        """One run with its details."""
        with self.explained(f"has no run {run_id}"):
            return self.client.get_run(run_id)

    def link(self, run_id: str) -> str:
        """The page of a run."""
        return f"{self.host}/#/runs/details/{run_id}"

    def _find_pipeline(self, name: str) -> V2beta1Pipeline | None:
        # by hand, as Client.get_pipeline_id() knows no namespace
        found = _pages(self.client.list_pipelines, "pipelines", namespace=self.namespace)
        return next((one for one in found if name in (one.name, one.display_name)), None)

    def _find_version(self, pipeline_id: str, name: str) -> V2beta1PipelineVersion | None:
        found = _pages(self.client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id)
        return next((one for one in found if name in (one.name, one.display_name)), None)


def pipeline_name(package: Path) -> str:
    """Name of the pipeline in a YAML that `compile` wrote.

    Raises:
        UserError: it isn't there, or is something else.
    """
    return str(read_package(package)["pipelineInfo"]["name"])


def read_package(package: Path) -> dict[str, Any]:
    """The pipeline in a YAML that `compile` wrote.

    Raises:
        UserError: it isn't there, or is something else.
    """
    try:
        document = next(iter(yaml.load_all(package.read_text("utf-8"), _Loader)), None)
    except OSError as error:
        raise UserError(
            f"{package}: {(error.strerror or '').lower()}; write it with `python pipeline.py compile --out DIR`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    if not (isinstance(document, dict) and {"pipelineInfo", "root", "components"} <= document.keys()):
        raise UserError(f"{package}: is no compiled pipeline; write it with `python pipeline.py compile --out DIR`")
    return document


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_enabled(job: V2beta1RecurringRun) -> bool:
    """Whether a schedule starts runs."""
    # the mode is only what it was created with
    return job.status == "ENABLED" if job.status in {"ENABLED", "DISABLED"} else job.mode == "ENABLE"


def _pages(ask: Callable[..., Any], field: str, **arguments: Any) -> Iterator[Any]:
    token = ""
    while True:
        page = ask(page_token=token, page_size=PAGE, **arguments)
        yield from getattr(page, field) or []
        if not (token := page.next_page_token):
            return


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Somebody else may create the same thing at the same moment."""
    try:
        yield
    except ApiException as error:
        if error.status != 409:
            raise


def _complaint(error: ApiException, what: str) -> str:
    try:
        answer = json.loads(error.body)
        said = " ".join(str(answer.get("message") or answer.get("error") or "").split())
    except (TypeError, ValueError, AttributeError):
        said = ""
    if error.status in {301, 302, 303, 307, 308, 401}:
        return f"asks for a login ({error.status}); give a bearer token in KFP_TOKEN"
    if error.status == 403:
        return f"{what} (403 {said or error.reason}); check --namespace, and what the token may do there"
    if error.status == 404 and not said:
        return "has no API v2beta1 (404); Kubeflow Pipelines 2 is needed, and the URL often ends in /pipeline"
    return f"{what} ({error.status} {said or error.reason})"
