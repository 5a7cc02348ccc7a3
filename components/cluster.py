"""Where a step runs on a cluster, and with what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes
from kubernetes.utils import parse_quantity

from components import TOOLS_IMAGE, TRAIN_IMAGE
from softteacher.errors import UserError
from softteacher.storage import is_s3

# How long a run may take that has no deadline of its own
LONGEST_SECONDS = 30 * 24 * 3600
# Label and projected token by which a multi-user Kubeflow lets a pod ask KFP's API (its PodDefault)
API_LABEL = ("access-ml-pipeline", "true")


@dataclass(frozen=True)
class ClusterOptions:
    """What a cluster needs to know, fixed when the pipeline is compiled.

    Attributes:
        train_image: Image of train, evaluate and export.
        tools_image: Image of all other steps.
        image_pull_secrets: Secrets by which the nodes may pull the two images.
        gpu_type: Resource name of the accelerator of train and evaluate.
        gpus: How many of them train on a node; 0 trains on the processor. evaluate takes one.
        nodes: How many nodes train together; with more than one, the step submits a Kubeflow Trainer `TrainJob`.
        checkpoints: s3:// prefix for the checkpoints of all runs; empty: a training that is tried again begins anew.
            Many nodes need one.
        cpu: Processor limit of the steps on the train image, such as 8 or 500m.
        memory: Memory limit of the steps on the train image.
        tools_cpu: Processor limit of the steps on the tools image.
        tools_memory: Memory limit of the steps on the tools image.
        shm: Size of the memory-backed /dev/shm that the loader's workers share.
        image_cache: Size of the volume for images of S3 and weights on the steps of the train image, somewhat over
            data.cache_mb: a pod that fills it is ended.
        shards: In how many pods at once an evaluation looks at its images, and a retraining at those that arrived.
        node_selector: Node labels that train and evaluate ask for, each label=value.
        tolerations: Taints that train and evaluate tolerate, each key[=value]:effect.
        retries: Times that a failed step is tried again, after 1, 2, 4, ... minutes.
        step_timeout: Hours after which the pod of a step other than train is ended; 0: never.
        run_timeout: Hours after which a run is ended as a whole; 0: never.
        cache: Whether split may take its result from an earlier run with the same data.
        pipeline_root: s3:// prefix for artifacts; empty: that of the cluster (`kfp-launcher`).
        s3_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, given to every step as environment, and
            AWS_SESSION_TOKEN if it has one.
        s3_endpoint: URL of the object store; empty for AWS.
        s3_region: Region of the object store; empty: what its client takes for itself.
        webhook_secret: Secret with the `url` that the end of a run is posted to; empty: it is only logged.
        kfp_api: URL of KFP's API inside the cluster, which knows the step that failed.
        kfp_ui: URL of KFP's pages, for links to a run.
    """

    train_image: str = TRAIN_IMAGE
    tools_image: str = TOOLS_IMAGE
    image_pull_secrets: Sequence[str] = ()
    gpu_type: str = "nvidia.com/gpu"
    gpus: int = 1
    nodes: int = 1
    checkpoints: str = ""
    cpu: str = "8"
    memory: str = "32Gi"
    tools_cpu: str = "4"
    tools_memory: str = "8Gi"
    shm: str = "8Gi"
    image_cache: str = "24Gi"
    shards: int = 1
    node_selector: Sequence[str] = ()
    tolerations: Sequence[str] = ()
    retries: int = 2
    step_timeout: float = 24.0
    run_timeout: float = 0.0
    cache: bool = True
    pipeline_root: str = ""
    s3_secret: str = ""
    s3_endpoint: str = ""
    s3_region: str = ""
    webhook_secret: str = ""
    kfp_api: str = "http://ml-pipeline.kubeflow:8888"
    kfp_ui: str = ""

    def __post_init__(self) -> None:
        """Refuse what no cluster could run.

        Raises:
            UserError: an option is wrong, or misses another one.
        """
        least = {"gpus": 0, "nodes": 1, "shards": 1, "retries": 0, "step_timeout": 0, "run_timeout": 0}
        for name, value in least.items():
            if not value <= getattr(self, name) < 100_000:  # of hours, what 32 bits hold in seconds; not nan either
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name):g}: must be a number from {value} to 99999"
                )
        if self.nodes > 1 and not is_s3(self.checkpoints):
            raise UserError(
                f"--nodes {self.nodes}: they share checkpoints and model through S3; "
                "add --checkpoints s3://bucket/prefix"
            )
        if self.checkpoints and not is_s3(self.checkpoints):
            raise UserError(
                f"--checkpoints {self.checkpoints}: is in the pod, and lost with it; write s3://bucket/prefix"
            )
        if self.pipeline_root and "://" not in self.pipeline_root:
            raise UserError(f"--pipeline-root {self.pipeline_root}: write a prefix such as s3://bucket/kfp")
        self.parsed_selector()
        self.parsed_tolerations()
        if not all(secret.strip() for secret in self.image_pull_secrets):
            raise UserError("--image-pull-secret: is empty; give the name of a secret, or leave it out")

    def longest(self) -> int:
        """Seconds that a run may take."""
        return round(3600 * self.run_timeout) or LONGEST_SECONDS

    def parsed_selector(self) -> dict[str, str]:
        """Value by node label."""
        selector = {}
        for text in self.node_selector:
            label, separator, value = text.partition("=")
            if not (label and separator):
                raise UserError(f"--node-selector {text}: write label=value, for example pool=gpu")
            selector[label] = value
        return selector

    def parsed_tolerations(self) -> list[dict[str, str]]:
        """Key, operator, effect, and with `Equal` the value, of each toleration."""
        tolerations = []
        for text in self.tolerations:
            taint, separator, effect = text.rpartition(":")
            if not (separator and effect in {"NoSchedule", "PreferNoSchedule", "NoExecute"}):
                raise UserError(f"--toleration {text}: write key[=value]:effect, for example nvidia.com/gpu:NoSchedule")
            key, equal, value = taint.partition("=")
            toleration = {"key": key, "effect": effect, "operator": "Equal" if equal else "Exists"}
            tolerations.append(toleration | ({"value": value} if equal else {}))
        return tolerations


def place(
    task: dsl.PipelineTask,
    options: ClusterOptions | None,
    *,
    heavy: bool = False,
    gpus: int | None = None,
    launches: bool = False,
    long: bool = False,
    reports: bool = False,
    cached: bool = False,
) -> dsl.PipelineTask:
    """Give a task its image, resources, node, retries, timeout and S3 access.

    Args:
        task: The task.
        options: Of the cluster; none for a run on this machine, where there are no pods to configure.
        heavy: Whether it needs what trains.
        gpus: How many accelerators it takes; none: it may run on any node.
        launches: Whether it hands its resources on to pods of its own.
        long: Whether it may take days, so that only the run as a whole has a deadline.
        reports: Whether it tells how the run ended.
        cached: Whether an earlier result may stand in for it: only where its arguments say all that it depends on.
    """
    if options is None:
        return task.set_caching_options(False)
    task.set_caching_options(cached and options.cache)
    image = options.train_image if heavy and not launches else options.tools_image
    task.set_container_image(image)
    # for the provenance of models; on many nodes the train image trains
    task.set_env_variable("SOFTTEACHER_IMAGE", options.train_image if launches else image)
    if launches:  # the nodes are to go with this pod
        kubernetes.use_field_path_as_env(task, "SOFTTEACHER_POD", "metadata.name")
        kubernetes.use_field_path_as_env(task, "SOFTTEACHER_POD_UID", "metadata.uid")
    else:  # the nodes lack the label; the step has the id as an argument
        # KFP replaces its placeholders in arguments, not in the environment
        kubernetes.use_field_path_as_env(task, "SOFTTEACHER_RUN", "metadata.labels['pipeline/runid']")
    task.set_cpu_limit(options.cpu if heavy else options.tools_cpu)
    task.set_memory_limit(options.memory if heavy else options.tools_memory)
    if not heavy:  # most of them need little, and the scheduler would reserve their limits
        task.set_cpu_request(min("250m", options.tools_cpu, key=parse_quantity))
        task.set_memory_request(min("1Gi", options.tools_memory, key=parse_quantity))
    if options.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, [*options.image_pull_secrets])
    if heavy and not launches:
        # where the image's HOME has it; with a size, so that this pod goes where the disk is full, not its neighbours
        kubernetes.empty_dir_mount(task, "cache", "/tmp/.cache", size_limit=options.image_cache)
        # a pod's own /dev/shm is 64 MB, too small for the loader's workers
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=options.shm)
    if gpus:
        task.set_accelerator_type(options.gpu_type).set_accelerator_limit(gpus)
    if gpus is not None:
        for label, value in options.parsed_selector().items():
            kubernetes.add_node_selector(task, label, value)
        for toleration in options.parsed_tolerations():
            kubernetes.add_toleration(task, **toleration)
    if options.retries:
        # the last bounds no wait: so long after the start of the first try Argo starts no other, and ends one that runs
        waits = {"backoff_duration": "60s", "backoff_factor": 2, "backoff_max_duration": f"{options.longest()}s"}
        task.set_retry(options.retries, **waits)
    if options.step_timeout and not long:
        kubernetes.set_timeout(task, round(3600 * options.step_timeout))
    if options.s3_secret:
        keys = {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        kubernetes.use_secret_as_env(task, options.s3_secret, keys)
        token = {"AWS_SESSION_TOKEN": "AWS_SESSION_TOKEN"}
        kubernetes.use_secret_as_env(task, options.s3_secret, token, optional=True)
    if options.s3_endpoint:
        task.set_env_variable("AWS_ENDPOINT_URL_S3", options.s3_endpoint)
    if options.s3_region:
        task.set_env_variable("AWS_DEFAULT_REGION", options.s3_region)
    if reports:
        kubernetes.add_pod_label(task, *API_LABEL)
        if options.webhook_secret:
            kubernetes.use_secret_as_env(task, options.webhook_secret, {"url": "SOFTTEACHER_WEBHOOK"}, optional=True)
    return task


def run_config(options: ClusterOptions | None) -> dict[str, Any]:
    """What `dsl.pipeline` takes besides the name: the root of artifacts, and the deadline of a run."""
    if options is None:
        return {}
    seconds = round(3600 * options.run_timeout) or None
    root = {"pipeline_root": options.pipeline_root} if options.pipeline_root else {}
    return {**root, "pipeline_config": dsl.PipelineConfig(active_deadline_seconds=seconds)}
