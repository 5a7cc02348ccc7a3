"""What the state says of an image outlives its being broken for a while."""

import pytest

from softteacher.collecting.rounds import State
from tests.arrivals import Place, picture


@pytest.mark.parametrize("accepted", [False, True])
def test_an_image_that_was_broken_once_is_of_its_old_round(local: Place, accepted: bool) -> None:
    local.put("10.png", picture(10))
    local.collect()
    local.commit(accepted=accepted)
    known = State.read(local.state).images()
    local.put("10.png", picture(10)[:-500])  # half of it is there again
    local.put("11.png", picture(11))
    facts = local.collect()
    assert (facts["new"], facts["left_out"]["broken"]["images"]) == (1, 1)
    local.commit()
    now = State.read(local.state).images()
    row, before = (t.take([t.uris.index(f"{local.source}/10.png")]) for t in (now, known))
    assert row.to_bytes() == before.to_bytes()
    local.put("10.png", picture(10))
    facts = local.collect()
    assert (facts["new"], facts["of_earlier_rounds"]) == (0, 1 + accepted)
    local.put("10.png", picture(30))  # another picture is new
    assert local.collect()["new"] == 1
