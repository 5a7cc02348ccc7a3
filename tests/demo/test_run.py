"""What the demo looks at before it trains; the whole of it is in tests/integration/test_demo.py."""

from pathlib import Path

import pytest

from softteacher import storage
from softteacher.demo.run import check_classes
from softteacher.errors import UserError
from softteacher.serving.repository import config, read_onnx_folder
from tests.helpers import onnx_folder
from tests.samples import coco_tree, write_coco


def test_data_must_have_the_classes_of_the_live_model(tmp_path: Path) -> None:
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    live = read_onnx_folder(onnx_folder(tmp_path / "onnx", categories=categories))
    repository = str(tmp_path / "repository")
    storage.write_bytes(storage.join(repository, "pets", "config.pbtxt"), config(live, 1).encode())
    more = write_coco(tmp_path / "more", coco_tree(classes=("bird", "dog", "cat")))
    check_classes(str(more), repository, "pets")
    other = write_coco(tmp_path / "other", coco_tree(classes=("bird", "dog")))
    with pytest.raises(
        UserError, match=r"instances_train\.json: lacks the classes cat of the model .* take another --out"
    ):
        check_classes(str(other), repository, "pets")
