"""The step `evaluate`."""

from kfp import dsl

from components import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    detections: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Artifact],
):
    """Score a model's teacher and student on the validation part with the COCO metrics.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        model: Model folder that `train` wrote.
        metrics: teacher_AP, teacher_AP50, ..., student_AP, ... (-1: no box of that kind in the data).
        detections: Which detections of the teacher are right: the confusion matrix with `background` for what was
            missed or isn't there, and the ROC curve of their scores; without the matrix for more than 40 classes.
        report: The self-contained HTML report.
        results: Folder with metrics.json, detections.json (COCO results format) and report.html.
    """
    import json
    import shutil
    from pathlib import Path

    from softteacher.evaluation.evaluate import evaluate
    from softteacher.evaluation.metrics import numbers

    scores = evaluate(model.path, str(Path(dataset.path, "validation.json")), results.path)
    for weights in ("teacher", "student"):
        for key, value in numbers(scores.get(weights, {})).items():
            metrics.log_metric(f"{weights}_{key}", value)
    found = scores["confusion"]
    if len(found["classes"]) <= 41:  # KFP's page and its database take no larger ones well
        detections.log_confusion_matrix(found["classes"], found["matrix"])
    if found["roc"]["fpr"]:
        detections.log_roc_curve(**found["roc"])
    shutil.copyfile(Path(results.path, "report.html"), report.path)
    print(json.dumps({"step": "evaluate", **metrics.metadata}))
