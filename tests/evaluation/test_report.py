"""The report: one page without outside references, with the numbers and pictures that it promises."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.evaluation.plots import recall_curve
from softteacher.evaluation.report import GALLERY, verdict, write_report
from tests.evaluation.test_metrics import perfect
from tests.samples import coco_tree, dataset, write_coco

NASTY = "ä 方 <script>alert(1)</script> \"'{{ x }}"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "action", "data", "srcset"}]

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tree = coco_tree(14, classes=(NASTY, "dog"))
    tree["images"][0]["file_name"] = "<b>ü.png"
    tree["annotations"] = tree["annotations"][:-2]  # the last image has none
    data = dataset(write_coco(tmp_path_factory.mktemp("report") / "set", tree, coco_tree(2, classes=(NASTY, "dog"))))
    found = perfect(data)
    for n, d in enumerate(found.values()):
        d.boxes = d.boxes + 0.12 * n  # ever worse
    results = coco_results(data, found)
    numbers = coco_metrics(data, results)
    metrics = numbers | {"weights": "student", "student": numbers}
    provenance = {"method": "soft_teacher", "created": "today", "git_sha": None}
    sections = [(f"Figure of {NASTY}", "What it says.", recall_curve(numbers["curve"]))]
    return Page(write_report(data, results, metrics, provenance, sections)), metrics


def test_no_outside_reference(page):
    assert len(page[0].links) == 3 + 2 * GALLERY  # icon, section, curve, galleries
    assert all(link.startswith("data:") for link in page[0].links)
    assert not {"script", "iframe", "object", "form"} & set(page[0].tags)


def test_pictures_are_pictures(page):
    pictures = [link for link in page[0].links if "base64," in link]
    for link in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(link.split("base64,")[1])))
        assert np.asarray(image).std() > 0
    assert len(pictures) == 2 + 2 * GALLERY


def test_numbers_and_names(page):
    parsed, metrics = page
    words = parsed.words
    assert NASTY in words
    assert {f"Figure of {NASTY}", "What it says."} <= set(words)
    for key in ("AP", "AP50", "AP75", "AR100"):
        assert f"{metrics[key]:.3f}" in words
    assert f"{metrics['per_class']['dog']:.3f}" in words
    captions = [int(m.group(1)) for w in words if (m := re.search(r"\(id (\d+)\)$", w))]
    assert "<b>ü.png (id 1)" in words
    assert captions == [1, 2, 3, 4, 5, 6, 13, 12, 11, 10, 9, 8]


@pytest.mark.parametrize(
    ("weights", "teacher", "student", "expected"),
    [
        ("teacher", 0.5, 0.4, "The teacher reaches an AP of 0.500 on 8 images, 0.100 above the student. "
         "Best class: b (0.700); worst: a (0.300)."),
        ("teacher", 0.4, 0.5, "The teacher reaches an AP of 0.400 on 8 images, 0.100 below the student. "
         "Best class: b (0.700); worst: a (0.300)."),
        ("student", 0.4, 0.4, "The student reaches an AP of 0.400 on 8 images, as the teacher does. "
         "Best class: b (0.700); worst: a (0.300)."),
        ("student", None, 0.4, "The student reaches an AP of 0.400 on 8 images. "
         "Best class: b (0.700); worst: a (0.300)."),
    ],
)  # fmt: skip
def test_verdict(weights, teacher, student, expected):
    scores = {name: {"AP": ap} for name, ap in (("teacher", teacher), ("student", student)) if ap is not None}
    classes = {"a": 0.3, "b": 0.7, "none in the data": None}
    assert verdict(scores[weights] | scores | {"weights": weights, "per_class": classes}, 8) == expected
    alone = {"AP": 0.3, "weights": weights, "per_class": {"a": 0.3}}
    assert verdict(alone, 1) == f"The {weights} reaches an AP of 0.300 on 1 image."
