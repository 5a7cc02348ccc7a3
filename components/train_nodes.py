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
    processes: int,
    nodes: int,
    image: str,
    shm: str,
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
        processes: How many train together on each node, one an accelerator.
        nodes: How many nodes.
        image: Image of the nodes.
        shm: Size of the memory-backed /dev/shm of each node.
        task_config: Resources, environment, volumes, node selector and tolerations of the task, from KFP.
        model: Model folder: weights of teacher and student, settings, classes, metrics, provenance.
    """
    import json

    from kubeflow.trainer import TrainerClient

    from components.trainjob import train_on_nodes
    from softteacher import storage

    options = [*overrides, f"method.name={method}"]
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
    )
    numbers = {w: {k: v for k, v in m.items() if isinstance(v, int | float)} for w, m in metrics.items()}
    model.metadata.update({"method": method, "preset": preset, "overrides": overrides, "metrics": numbers})
    print(json.dumps({"step": "train", **model.metadata}))
