"""A json may write the path of an image in more than one way; on a disk it is the same image."""

import pytest

from softteacher import storage
from softteacher.errors import UserError
from tests.arrivals import Place, picture, tree


@pytest.mark.parametrize("name", ["./5.png", "sub//5.png", ".//./5.png"])
def test_other_ways_to_write_a_path(local: Place, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The copy of a validation image is kept out, whatever the json calls the original."""
    storage.write_bytes(f"{local.root}/images/{name}", picture(5))
    storage.write_bytes(f"{local.base}/validation.json", tree([name, "6.png"], 6, f"{local.root}/./images/"))
    storage.write_bytes(f"{local.root}/l.json", tree([".//11.png"]))
    local.put("copy.png", picture(5))
    local.put("10.png", picture(10))
    local.put("11.png", picture(11))
    facts = local.collect(labels=[f"{local.root}/l.json"])
    assert local.names(new=True) == ["10.png"]
    assert facts["left_out"]["in the validation set"]["images"] == 1
    assert facts["new_labeled"] == 1
    assert "missing or broken" not in capsys.readouterr().err


def test_the_base_s_images_in_the_source(local: Place) -> None:
    """Labelled there, they are not new, by whatever path."""
    local.put("a/0.png", picture(0))
    storage.write_bytes(f"{local.base}/labeled.json", tree(["a/.//0.png"], 1, f"{local.root}//incoming"))
    facts = local.collect()
    assert (facts["new"], facts["left_out"]["duplicates"]["images"]) == (0, 0)


def test_keys_that_differ_on_s3_are_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_bytes(f"{place.base}/validation.json", tree(["./5.png", "6.png"], 6, f"{place.root}/images"))
    place.put("10.png", picture(10))
    assert place.collect()["new"] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 validation images are missing or broken" in said
    assert "(first: ./5.png)" in said
    storage.write_bytes(f"{place.base}/validation.json", tree(["./5.png"], 6, f"{place.root}/images"))
    with pytest.raises(UserError, match=r"can't be compared with them.*file_name.*\(first: \./5\.png\)"):
        place.collect()
