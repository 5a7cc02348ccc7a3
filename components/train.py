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
        processes: How many train together, one an accelerator.
        model: Model folder: weights of teacher and student, settings, classes, metrics, provenance.
    """
    import json
    from pathlib import Path

    from softteacher import storage
    from softteacher.config import load_settings
    from softteacher.training.launch import launch

    manifests = Path(dataset.path)
    metrics = launch(
        str(manifests / "labeled.json"),
        str(manifests / "unlabeled.json"),
        str(manifests / "validation.json"),
        model.path,
        load_settings(preset, [*overrides, f"method.name={method}"]),
        checkpoints=storage.join(checkpoints, run, name, "checkpoints") if checkpoints else None,
        processes=processes,
    )
    # the per-class table and the curves are in the folder's metrics.json
    numbers = {w: {k: v for k, v in m.items() if isinstance(v, int | float)} for w, m in metrics.items()}
    model.metadata.update({"method": method, "preset": preset, "overrides": overrides, "metrics": numbers})
    print(json.dumps({"step": "train", **model.metadata}))
