"""The step `train` on many nodes: its pod submits a Kubeflow Trainer `TrainJob` and waits for it."""

from kfp import dsl

from components import TOOLS_IMAGE

# What the options of the task mean is the nodes; this pod takes no accelerator and runs anywhere. S3 both need.
PASSED_ON = [
    dsl.TaskConfigField.RESOURCES,
    dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
    dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
    dsl.TaskConfigField.KUBERNETES_AFFINITY,
    dsl.TaskConfigField.KUBERNETES_VOLUMES,
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.ENV, apply_to_task=True),
]


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False, task_config_passthroughs=PASSED_ON)
def train_nodes(
    dataset: dsl.Input[dsl.Dataset],
    method: str,
    preset: str,
    overrides: list[str],
    checkpoints: str,
    run: str,
    name: str,
    init: str,
    new_share: float,
    processes: int,
    nodes: int,
    image: str,
    shm: str,
    deadline: int,
    pull_secrets: list[str],
    task_config: dsl.TaskConfig,
    model: dsl.Output[dsl.Model],
):
    """Train a detector on many nodes; tried again, it waits for the job that runs, or starts one that goes on.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        method: soft_teacher, mean_teacher, stac or supervised.
        preset: Name of a preset of settings, such as coco-10pct.
        overrides: Settings as key=value on top of the preset.
        checkpoints: s3:// prefix for the checkpoints of all runs; manifests and model pass through it too.
        run: Id of the run.
        name: Name of the training, one of its own for each in a run.
        init: s3:// prefix of a model folder that the training starts from, over detector.init_from; empty: none.
        new_share: Share of the unlabelled images of a batch that `collect` found new, over training.new_share; 0: none.
        processes: How many train together on each node, one an accelerator.
        nodes: How many nodes.
        image: Image of the nodes.
        shm: Size of the memory-backed /dev/shm of each node.
        deadline: Seconds that the nodes may take in all.
        pull_secrets: Secrets by which the nodes may pull the image.
        task_config: Resources, environment, volumes, node selector and tolerations of the task, from KFP.
        model: Model folder: weights of teacher and student, settings, classes, metrics, provenance.
    """
    import json
    import os

    from kubeflow.trainer import TrainerClient

    from components.trainjob import train_on_nodes
    from softteacher import storage
    from softteacher.evaluation.metrics import numbers

    options = [*overrides, f"method.name={method}", *([f"detector.init_from={init}"] if init else [])]
    options += [f"training.new_share={new_share}"] if new_share else []
    # for the provenance of the model; this pod's own image is another
    told = {"SOFTTEACHER_RUN": run, "SOFTTEACHER_IMAGE": image}
    pod = {"name": "SOFTTEACHER_POD", "uid": "SOFTTEACHER_POD_UID"}  # of this pod, not of the nodes'
    others = [variable for variable in task_config.env or [] if variable["name"] not in {*told, *pod.values()}]
    task_config.env = [*others, *({"name": key, "value": value} for key, value in told.items())]
    metrics = train_on_nodes(
        TrainerClient(),
        dataset.path,
        model.path,
        storage.join(checkpoints, run, name),
        ["--preset", preset, *(part for option in options for part in ("--set", option))],
        image=image,
        nodes=nodes,
        processes=processes,
        shm=shm,
        task=task_config,
        deadline=deadline,
        owner={key: os.environ[variable] for key, variable in pod.items()},
        pull_secrets=pull_secrets,
    )
    scores = {weights: numbers(score) for weights, score in metrics.items()}
    model.metadata.update({"method": method, "preset": preset, "overrides": overrides, "metrics": scores})
    print(json.dumps({"step": "train", **model.metadata}))
