"""Steps that grow with the number of images, for many pods at once: each looks at its shard, one step joins them.

with dsl.ParallelFor([1, 2, 3, 4]) as number:
    part = evaluate_shard(dataset=parts, model=model, number=number, of=4)
join_evaluation(dataset=parts, model=model, parts=dsl.Collected(part.outputs["part"]))
"""

from kfp import dsl

from components import TOOLS_IMAGE, TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate_shard(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    number: int,
    of: int,
    part: dsl.Output[dsl.Artifact],
):
    """Look at a share of the validation part with a model's teacher and student.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        model: Model folder that `train` wrote.
        number: Of the shard, from 1.
        of: How many shards there are.
        part: Folder with what was found.
    """
    import json
    from pathlib import Path

    from softteacher.evaluation.evaluate import evaluate
    from softteacher.evaluation.shard import Shard

    data = str(Path(dataset.path, "validation.json"))
    facts = evaluate(model.path, data, part.path, shard=Shard(int(number), of))
    print(json.dumps({"step": "evaluate-shard", "number": int(number), **facts}))


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def join_evaluation(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    parts: dsl.Input[list[dsl.Artifact]],
    metrics: dsl.Output[dsl.Metrics],
    detections: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Artifact],
):
    """Score what all shards found; the numbers are those of `evaluate`.

    Args:
        dataset: Folder of the manifests that `split` wrote.
        model: Model folder that `train` wrote.
        parts: Folders that `evaluate_shard` wrote, of all shards.
        metrics: teacher_AP, teacher_AP50, ..., student_AP, ... (-1: no box of that kind in the data).
        detections: Which detections of the teacher are right, as `evaluate` has it.
        report: The self-contained HTML report.
        results: Folder with metrics.json, detections.json (COCO results format) and report.html.
    """
    import json
    import shutil
    from pathlib import Path

    from softteacher.evaluation.evaluate import evaluate
    from softteacher.evaluation.metrics import numbers

    data = str(Path(dataset.path, "validation.json"))
    scores = evaluate(model.path, data, results.path, parts=[part.path for part in parts])
    for weights in ("teacher", "student"):
        for key, value in numbers(scores[weights]).items():
            metrics.log_metric(f"{weights}_{key}", value)
    found = scores["confusion"]
    if len(found["classes"]) <= 41:
        detections.log_confusion_matrix(found["classes"], found["matrix"])
    if found["roc"]["fpr"]:
        detections.log_roc_curve(**found["roc"])
    shutil.copyfile(Path(results.path, "report.html"), report.path)
    print(json.dumps({"step": "evaluate", **metrics.metadata}))


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def rank_shard(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    number: int,
    of: int,
    part: dsl.Output[dsl.Artifact],
):
    """Look at a share of the unlabelled part with a model's teacher.

    Args:
        dataset: Folder of the manifests that `split` or `collect` wrote.
        model: Model folder that `train` wrote.
        number: Of the shard, from 1.
        of: How many shards there are.
        part: Folder with what was found.
    """
    import json
    from pathlib import Path

    from softteacher.evaluation.rank import rank
    from softteacher.evaluation.shard import Shard

    manifests = Path(dataset.path)
    labeled = str(manifests / "labeled.json")
    rank(model.path, str(manifests / "unlabeled.json"), part.path, labeled=labeled, shard=Shard(int(number), of))
    print(json.dumps({"step": "rank-shard", "number": int(number)}))


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def join_ranking(
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    parts: dsl.Input[list[dsl.Artifact]],
    top: int,
    ranking: dsl.Output[dsl.Artifact],
):
    """Say which unlabelled images are most worth labelling, by what all shards found.

    Args:
        dataset: Folder of the manifests that `split` or `collect` wrote.
        model: Model folder that `train` wrote.
        parts: Folders that `rank_shard` wrote, of all shards.
        top: Number of images.
        ranking: Folder with ranking.csv, ranking.json, to_label.json and contact_sheet.jpg.
    """
    import json
    from pathlib import Path

    from softteacher.evaluation.rank import rank

    manifests = Path(dataset.path)
    rows = rank(
        model.path,
        str(manifests / "unlabeled.json"),
        ranking.path,
        top=top,
        labeled=str(manifests / "labeled.json"),
        parts=[part.path for part in parts],
    )
    print(json.dumps({"step": "rank", "images": len(rows), "first": rows[0]["file_name"]}))


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def predict_shard(
    images: list[str], triton: str, name: str, score: float, number: int, of: int, part: dsl.Output[dsl.Artifact]
):
    """Ask the endpoint about a share of the images.

    Args:
        images: s3:// URIs and prefixes.
        triton: URL of the Triton server, http://host:port or grpc://host:port.
        name: Name of the model.
        score: Lowest score that is kept.
        number: Of the shard, from 1.
        of: How many shards there are.
        part: The answers as JSON.
    """
    import json

    from softteacher.evaluation.shard import Shard
    from softteacher.serving.predict import predict_files

    shard = Shard(int(number), of)
    predict_files(images, triton, name, score=score, form="json", output=part.path, shard=shard)
    print(json.dumps({"step": "predict-shard", "number": shard.number}))


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def join_predictions(
    images: list[str],
    triton: str,
    name: str,
    parts: dsl.Input[list[dsl.Artifact]],
    form: str,
    answers: dsl.Output[dsl.Artifact],
):
    """Write the answers of all shards as one run would have.

    Args:
        images: As of the shards.
        triton: URL of the Triton server, for the names of the classes.
        name: Name of the model.
        parts: The answers of all shards.
        form: json, coco or csv.
        answers: The file.
    """
    import json

    from softteacher.serving.predict import predict_files

    predict_files(images, triton, name, form=form, output=answers.path, parts=[part.path for part in parts])
    print(json.dumps({"step": "predict", "parts": len(parts)}))
