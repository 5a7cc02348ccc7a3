"""Labels that arrive between two rounds join the labelled images."""

import hashlib
import json

import pytest

from softteacher import storage
from softteacher.collecting.rounds import State
from softteacher.errors import UserError
from tests.arrivals import picture, tree


def test_labels_that_arrive(place):
    for n in (10, 11, 12, 13):
        place.put(f"{n}.png", picture(n))
    place.collect()
    place.commit()
    # two images of the source, one of the base's unlabelled, by name, and another as the labelling tool wrote it
    labels = f"{place.root}/labels"
    storage.write_bytes(f"{labels}/2.json", tree(["2.png"], root=f"{place.root}/images", category=2))
    storage.write_bytes(f"{labels}/source.json", tree(["10.png", "13.png"], category=2))
    storage.write_bytes(f"{labels}/images/export.jpg", picture(3, "JPEG", quality=70))
    storage.write_bytes(f"{labels}/z.json", tree(["export.jpg"], category=2))
    facts = place.collect(labels=[labels])
    assert (facts["enough"], facts["new"], facts["new_labeled"]) == (True, 0, 4)
    labeled = place.part("labeled")
    assert place.names(part="labeled") == ["0.png", "1.png", "2.png", "10.png", "13.png", "export.jpg"]
    assert labeled.class_counts() == {"cat": 2, "dog": 4}
    assert all(storage.exists(labeled.uri(n)) for n in range(len(labeled)))
    assert place.names() == ["4.png", "11.png", "12.png"]
    place.commit()
    # those labels are known, but stay; a correction of the base's is new
    assert place.collect(labels=[labels])["enough"] is False
    assert len(place.part("labeled")) == 6
    storage.write_bytes(f"{place.root}/fix.json", tree(["1.png"], category=2))
    facts = place.collect(labels=[labels, f"{place.root}/fix.json"])
    assert facts["new_labeled"] == 1
    assert place.part("labeled").class_counts() == {"cat": 1, "dog": 5}


def test_labels_of_validation_images_and_missing_ones_are_left_out(local, capsys):
    local.put("10.png", picture(10))
    local.put("leak.jpg", picture(5, "JPEG", quality=60))
    storage.write_bytes(f"{local.root}/l.json", tree(["10.png", "leak.jpg", "nowhere.png"]))
    facts = local.collect(labels=[f"{local.root}/l.json"])
    assert local.names(part="labeled") == ["0.png", "1.png", "10.png"]
    assert facts["left_out"]["labels of the validation set"]["first"] == [f"{local.source}/leak.jpg"]
    assert facts["left_out"]["labels without a whole image"]["first"] == [f"{local.source}/nowhere.png"]
    told = " ".join(capsys.readouterr().err.split())
    assert "l.json: 1 images are in the validation set and left out (first: leak.jpg)" in told
    assert "l.json: 1 images are missing or broken and left out (first: nowhere.png)" in told
    assert "leak.jpg" not in local.names()


def test_labels_whose_images_lie_in_two_places(local):
    local.put("10.png", picture(10))
    storage.write_bytes(f"{local.root}/labels/images/11.png", picture(11))
    storage.write_bytes(f"{local.root}/labels/l.json", tree(["11.png", "10.png"]))
    assert local.collect(labels=[f"{local.root}/labels/l.json"])["new_labeled"] == 2
    labeled = local.part("labeled")
    assert [labeled.uri(n) for n in (2, 3)] == [f"{local.root}/labels/images/11.png", f"{local.source}/10.png"]


def test_labels_of_a_rejected_round(local):
    for n in (10, 11):
        local.put(f"{n}.png", picture(n))
    storage.write_bytes(f"{local.root}/labels/bad.json", tree(["10.png"]))
    options = {"labels": [f"{local.root}/labels"]}
    assert local.collect(**options)["new_labeled"] == 1
    local.commit(accepted=False)
    storage.write_bytes(f"{local.root}/labels/good.json", tree(["12.png"]))
    local.put("12.png", picture(12))
    facts = local.collect(**options)
    assert (facts["new"], facts["new_labeled"]) == (0, 1)
    assert local.names(part="labeled") == ["0.png", "1.png", "12.png"]
    assert local.names() == ["2.png", "3.png", "4.png"]
    facts = local.collect(**options, include_rejected=True)
    assert (facts["new"], facts["new_labeled"]) == (1, 2)
    local.collect(**options)
    local.commit(accepted=True)
    assert State.read(local.state).labels(accepted=False) == {
        hashlib.sha256(storage.read_bytes(f"{local.root}/labels/bad.json")).hexdigest()
    }
    assert local.collect(**options)["new_labeled"] == 0
    assert local.names(part="labeled") == ["0.png", "1.png", "12.png"]


def test_labels_of_other_classes(local):
    other = json.loads(tree(["10.png"]))
    other["categories"][1]["name"] = "horse"
    local.put("10.png", picture(10))
    storage.write_bytes(f"{local.root}/l.json", json.dumps(other).encode())
    with pytest.raises(UserError, match="the class sets differ"):
        local.collect(labels=[f"{local.root}/l.json"])
