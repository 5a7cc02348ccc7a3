"""The steps that collect, run by KFP on this machine: one pod or several give the same round."""

import json
from pathlib import Path

import pytest
from kfp import dsl, local

from components.collect import collect, hash_images, merge_collect, plan_collect
from components.commit import commit
from softteacher.collecting.rounds import State
from tests.arrivals import Place, picture

ROOT = Path(__file__).parents[2]


@dsl.pipeline
def in_one(source: str, state: str, base: str) -> bool:
    task = collect(
        source=source,
        state=state,
        base=base,
        labels=[],
        min_new=2,
        near_duplicate_bits=10,
        max_bad_images=0.1,
        include_rejected=False,
    )
    with dsl.If(task.outputs["Output"] == True):  # noqa: E712 - KFP reads it
        commit(dataset=task.outputs["dataset"], state=state, accepted=True, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    return task.outputs["Output"]


@dsl.pipeline
def in_shards(source: str, state: str, base: str) -> bool:
    planned = plan_collect(source=source, state=state, base=base, labels=[], include_rejected=False, shards=2)
    # one at a time: KFP's local threads replace print() each, and may leave it replaced for the tests that follow
    with dsl.ParallelFor(planned.outputs["Output"], parallelism=1) as shard:
        hashed = hash_images(plan=planned.outputs["plan"], shard=shard)
    task = merge_collect(
        plan=planned.outputs["plan"],
        hashes=dsl.Collected(hashed.outputs["hashes"]),
        min_new=2,
        near_duplicate_bits=10,
        max_bad_images=0.1,
    )
    with dsl.If(task.outputs["Output"] == True):  # noqa: E712
        commit(dataset=task.outputs["dataset"], state=state, accepted=True, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    return task.outputs["Output"]


@pytest.mark.parametrize("pipeline", [in_one, in_shards], ids=["one", "shards"])
def test_two_rounds(pipeline, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    place = Place(str(tmp_path / "data"), tmp_path)
    for n in (10, 11, 12):
        place.put(f"{n}.png", picture(n))
    arguments = {"source": place.source, "state": place.state, "base": place.base}
    expected = place.collect(min_new=2)

    assert pipeline(**arguments).output is True
    [found] = (tmp_path / "root").rglob("collect.json")
    assert json.loads(found.read_text()) == expected
    for name in ("labeled.json", "unlabeled.json", "validation.json", "pending.json", "pending.npz"):
        assert (found.parent / name).read_bytes() == Path(place.pending, name).read_bytes()
    [round] = State.read(place.state).rounds
    assert (round["images"], round["accepted"]) == (3, True)
    assert round["run"]

    # too few: the run ends green, and the state stays
    place.put("13.png", picture(13))
    assert in_one(**arguments).output is False
    assert State.read(place.state).rounds == [round]
