"""`evaluate` and `rank` in shards: every file is that of one run, to the byte; what doesn't fit together is told."""

import json
from pathlib import Path

import numpy as np
import pytest

from softteacher import storage
from softteacher.data.coco import load_coco
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.evaluate import evaluate
from softteacher.evaluation.partial import load_found, save_found
from softteacher.evaluation.rank import rank
from softteacher.evaluation.shard import Shard
from softteacher.model_folder import ModelFolder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/0", " 1/2"])
def test_no_shard(text):
    with pytest.raises(UserError, match=f"--shard {text}: write number/of"):
        Shard.parse(text)


def test_shares_are_all_and_disjoint():
    for of in (1, 2, 3, 7):
        shares = [Shard(n + 1, of).share(range(5)) for n in range(of)]
        assert sorted(x for share in shares for x in share) == list(range(5))


def test_evaluate(trained, manifests, tmp_path):
    arguments = str(trained), str(manifests / "validation.json")
    whole = evaluate(*arguments, str(tmp_path / "whole"))
    parts = [str(tmp_path / str(n)) for n in (1, 2, 3)]
    seen = [evaluate(*arguments, part, shard=Shard(n, 3)) for n, part in zip((1, 2, 3), parts, strict=True)]
    assert sum(s["images"] for s in seen) == 6
    assert evaluate(*arguments, str(tmp_path / "joined"), parts=parts[::-1]) == whole
    assert files(tmp_path / "joined") == files(tmp_path / "whole")
    for wrong in (parts[:2], [*parts, parts[0]], [parts[0], parts[0], parts[1]]):
        with pytest.raises(UserError, match="each is needed once; run the missing ones"):
            evaluate(*arguments, str(tmp_path / "wrong"), parts=wrong)
    with pytest.raises(UserError, match="is of another model, data set or --set"):
        evaluate(str(trained), str(manifests / "labeled.json"), str(tmp_path / "wrong"), parts=parts)
    with pytest.raises(UserError, match="is of another model, data set or --set"):
        evaluate(*arguments, str(tmp_path / "wrong"), parts=parts, overrides=["detector.score_threshold=0.3"])
    with pytest.raises(UserError, match="is of another model, data set or --set"):  # of which the shares are others
        evaluate(*arguments, str(tmp_path / "wrong"), parts=parts, overrides=["training.evaluate_batch=2"])
    Path(parts[1], "student.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"student\.npz: torn, or not ours; run this shard again"):
        evaluate(*arguments, str(tmp_path / "wrong"), parts=parts)
    with pytest.raises(UserError, match=r"nowhere/teacher\.json: no such file"):
        evaluate(*arguments, str(tmp_path / "wrong"), parts=[str(tmp_path / "nowhere")])
    assert not (tmp_path / "wrong").exists()


def test_rank(trained, manifests, tmp_path, s3):
    arguments = str(trained), str(manifests / "unlabeled.json")
    whole = rank(*arguments, str(tmp_path / "whole"), top=4)
    parts = [f"{s3}/{n}" for n in (1, 2)]
    for n, part in enumerate(parts, start=1):
        assert rank(*arguments, part, shard=Shard(n, 2)) == []
    assert rank(*arguments, str(tmp_path / "joined"), top=4, parts=parts) == whole
    assert files(tmp_path / "joined") == files(tmp_path / "whole")


def test_broken_images_are_counted_when_the_shards_meet(trained, manifests, tmp_path, capsys):
    dataset, source = load_coco(manifests / "validation.json"), ModelFolder(trained)
    found = {
        image.id: Detections(
            np.full((n, 4), n, np.float32), np.full(n, 0.5, np.float32), np.arange(n), np.ones((n, 28, 28), np.float16)
        )
        for n, image in enumerate(dataset.images[:-1])
    }
    folders = [tmp_path / str(n) for n in range(3)]
    for n, folder in enumerate(folders):
        folder.mkdir()
        # the third one has no image
        mine = {image: d for at, (image, d) in enumerate(found.items()) if at % 2 == n}
        save_found(folder, "x", mine, Shard(n + 1, 3), source, dataset)
    again = load_found([str(f) for f in folders], "x", source, dataset)
    assert sorted(again) == sorted(found)
    for image, d in found.items():
        for key, value in vars(d).items():
            np.testing.assert_array_equal(getattr(again[image], key), value)
            assert getattr(again[image], key).dtype == value.dtype
    assert "1 of 6 images are missing or broken and left out" in " ".join(capsys.readouterr().err.split())
    save_found(folders[0], "x", {}, Shard(1, 3), source, dataset)
    with pytest.raises(UserError, match="4 of 6 images are missing or broken, 1 allowed"):
        load_found([str(f) for f in folders], "x", source, dataset)
    storage.write_bytes(folders[0] / "x.json", json.dumps([1]).encode())
    with pytest.raises(UserError, match="torn, or not ours"):
        load_found([str(f) for f in folders], "x", source, dataset)
