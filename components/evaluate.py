"""The step `evaluate`."""

from kfp import dsl

from components import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Artifact],
):
    """Score a model's teacher and student on the validation part with the COCO metrics.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        model: Model folder that `train` wrote.
        metrics: teacher_AP, teacher_AP50, ..., student_AP, ... (-1: no box of that kind in the data).
        report: The self-contained HTML report.
        results: Folder with metrics.json, detections.json (COCO results format) and report.html.
    """
    import json
    import shutil
    from pathlib import Path

    from softteacher.evaluation.evaluate import evaluate

    scores = evaluate(model.path, str(Path(dataset.path, "validation.json")), results.path)
    for weights in ("teacher", "student"):
        for key, value in scores.get(weights, {}).items():
            if isinstance(value, int | float):  # the per-class table is in metrics.json
                metrics.log_metric(f"{weights}_{key}", value)
    shutil.copyfile(Path(results.path, "report.html"), report.path)
    print(json.dumps({"step": "evaluate", **metrics.metadata}))
