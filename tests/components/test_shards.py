"""The steps in shards, called as Python with a real model and a real Triton: together they give what one step gives."""

import json
from pathlib import Path

import pytest
from kfp import dsl

from components.evaluate import evaluate
from components.shards import (
    evaluate_shard,
    join_evaluation,
    join_predictions,
    join_ranking,
    predict_shard,
    rank_shard,
)
from softteacher.evaluation.rank import rank
from softteacher.serving.predict import predict


def artifact(kind: type, folder: Path, name: str) -> dsl.Artifact:
    return kind(name=name, uri=str(folder / name), metadata={})


@pytest.fixture
def inputs(trained: Path, manifests: Path) -> dict[str, dsl.Artifact]:
    return {
        "dataset": artifact(dsl.Dataset, manifests.parent, manifests.name),
        "model": artifact(dsl.Model, trained.parent, trained.name),
    }


def parts(folder: Path) -> list[dsl.Artifact]:
    return [artifact(dsl.Artifact, folder, f"part-{n}") for n in (1, 2)]


def evaluation(folder: Path) -> dict[str, dsl.Artifact]:
    folder.mkdir()
    kinds = {"metrics": dsl.Metrics, "detections": dsl.ClassificationMetrics, "report": dsl.HTML}
    kinds |= {"results": dsl.Artifact}
    return {name: artifact(kind, folder, name) for name, kind in kinds.items()}


def test_evaluation(inputs, tmp_path: Path):
    found = parts(tmp_path)
    for n, part in enumerate(found, start=1):
        evaluate_shard.python_func(**inputs, number=float(n), of=2, part=part)  # as a number arrives out of a list
    joined, whole = evaluation(tmp_path / "joined"), evaluation(tmp_path / "whole")
    join_evaluation.python_func(**inputs, parts=found, **joined)
    evaluate.python_func(**inputs, **whole)
    for name in ("metrics", "detections"):
        assert joined[name].metadata == whole[name].metadata != {}
    assert Path(joined["report"].path).read_bytes() == Path(whole["report"].path).read_bytes()


def test_ranking(inputs, trained, manifests, tmp_path: Path):
    found, ranking = parts(tmp_path), artifact(dsl.Artifact, tmp_path, "ranking")
    for n, part in enumerate(found, start=1):
        rank_shard.python_func(**inputs, number=n, of=2, part=part)
    join_ranking.python_func(**inputs, parts=found, top=3, ranking=ranking)
    labeled = str(manifests / "labeled.json")
    rows = rank(str(trained), str(manifests / "unlabeled.json"), str(tmp_path / "one"), top=3, labeled=labeled)
    assert json.loads(Path(ranking.path, "ranking.json").read_text()) == rows


def test_predictions(hand_triton, digits, tmp_path: Path):
    asked = {"images": [str(digits / "images")], "triton": hand_triton.urls.http, "name": "squares"}
    found, answers = parts(tmp_path), artifact(dsl.Artifact, tmp_path, "answers")
    for n, part in enumerate(found, start=1):
        predict_shard.python_func(**asked, score=0.1, number=n, of=2, part=part)
    join_predictions.python_func(**asked, parts=found, form="json", answers=answers)
    assert json.loads(Path(answers.path).read_text()) == predict(*asked.values(), score=0.1)
