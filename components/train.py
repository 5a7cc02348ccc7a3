"""The step `train`, in its own pod: one process or, for more accelerators, several."""

from kfp import dsl

from components import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train(
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
    model: dsl.Output[dsl.Model],
):
    """Train a detector; tried again, it goes on from the last checkpoint.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        method: soft_teacher, mean_teacher, stac or supervised.
        preset: Name of a preset of settings, such as coco-10pct.
        overrides: Settings as key=value on top of the preset.
        checkpoints: Folder or s3:// prefix for the checkpoints of all runs; empty: in the pod, lost with it.
        run: Id of the run.
        name: Name of the training, one of its own for each in a run.
        init: Model folder or s3:// prefix of one that the training starts from, over detector.init_from; empty: none.
        new_share: Share of the unlabelled images of a batch that `collect` found new, over training.new_share; 0: none.
        processes: How many train together, one an accelerator.
        model: Model folder: weights of teacher and student, settings, classes, metrics, provenance.
    """
    import json
    import os
    from pathlib import Path

    from softteacher import storage
    from softteacher.config import load_settings
    from softteacher.evaluation.metrics import numbers
    from softteacher.training.launch import launch

    os.environ["SOFTTEACHER_RUN"] = run  # for the provenance of the model
    more = [f"detector.init_from={init}"] if init else []
    more += [f"training.new_share={new_share}"] if new_share else []
    manifests = Path(dataset.path)
    metrics = launch(
        str(manifests / "labeled.json"),
        str(manifests / "unlabeled.json"),
        str(manifests / "validation.json"),
        model.path,
        load_settings(preset, [*overrides, f"method.name={method}", *more]),
        checkpoints=storage.join(checkpoints, run, name, "checkpoints") if checkpoints else None,
        processes=processes,
    )
    # the per-class table and the curves are in the folder's metrics.json
    scores = {weights: numbers(score) for weights, score in metrics.items()}
    model.metadata.update({"method": method, "preset": preset, "overrides": overrides, "metrics": scores})
    print(json.dumps({"step": "train", **model.metadata}))
