"""Where a step runs on a cluster, and with what."""

from dataclasses import dataclass, field

from kfp import dsl, kubernetes

from components import TOOLS_IMAGE, TRAIN_IMAGE


@dataclass(frozen=True)
class ClusterOptions:
    """What a cluster needs to know, fixed when the pipeline is compiled.

    Attributes:
        train_image: Image of train, evaluate and export.
        tools_image: Image of split, gate and deploy.
        gpu_type: Resource name of the accelerator of train and evaluate.
        gpus: How many of them train on a node; 0 trains on the processor. evaluate takes one.
        nodes: How many nodes train together; with more than one, the step submits a Kubeflow Trainer `TrainJob`.
        checkpoints: s3:// prefix for the checkpoints of all runs; none: a training that is tried again begins anew.
            Many nodes need one.
        cpu: Processor limit of the steps on the train image, such as 8 or 500m.
        memory: Memory limit of the steps on the train image.
        tools_memory: Memory limit of the steps on the tools image.
        shm: Size of the memory-backed /dev/shm that the loader's workers share.
        node_selector: Node labels that train and evaluate ask for.
        tolerations: Taints that train and evaluate tolerate: key, operator, value, effect.
        retries: Times that a failed step is tried again, after 1, 2, 4, ... minutes.
        s3_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, given to every step as environment.
        s3_endpoint: URL of the object store; none for AWS.
    """

    train_image: str = TRAIN_IMAGE
    tools_image: str = TOOLS_IMAGE
    gpu_type: str = "nvidia.com/gpu"
    gpus: int = 1
    nodes: int = 1
    checkpoints: str | None = None
    cpu: str = "8"
    memory: str = "32Gi"
    tools_memory: str = "8Gi"
    shm: str = "8Gi"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    retries: int = 2
    s3_secret: str | None = None
    s3_endpoint: str | None = None


def place(
    task: dsl.PipelineTask, options: ClusterOptions, *, heavy: bool, gpus: int | None = None, launches: bool = False
) -> dsl.PipelineTask:
    """Give a task its image, resources, node, retries and S3 access.

    Args:
        task: The task.
        options: Of the cluster.
        heavy: Whether it needs what trains.
        gpus: How many accelerators it takes; none: it may run on any node.
        launches: Whether it hands its resources on to pods of its own.
    """
    task.set_container_image(options.train_image if heavy and not launches else options.tools_image)
    task.set_memory_limit(options.memory if heavy else options.tools_memory)
    if heavy:
        task.set_cpu_limit(options.cpu)
    if heavy and not launches:
        # a pod's own /dev/shm is 64 MB, too small for the loader's workers
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=options.shm)
    if gpus:
        task.set_accelerator_type(options.gpu_type).set_accelerator_limit(gpus)
    if gpus is not None:
        for label, value in options.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        for toleration in options.tolerations:
            kubernetes.add_toleration(task, **toleration)
    if options.retries:
        task.set_retry(options.retries, backoff_duration="60s", backoff_factor=2, backoff_max_duration="3600s")
    if options.s3_secret:
        keys = {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        kubernetes.use_secret_as_env(task, options.s3_secret, keys)
    if options.s3_endpoint:
        task.set_env_variable("AWS_ENDPOINT_URL_S3", options.s3_endpoint)
    return task
