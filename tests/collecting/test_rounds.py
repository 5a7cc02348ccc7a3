"""`commit`: a round is what one `collect` wrote."""

import shutil

import pytest

from softteacher.collecting.rounds import State, commit
from softteacher.errors import UserError
from tests.arrivals import Place, picture


def test_files_of_two_collects_are_no_round(local: Place) -> None:
    """What a `collect` leaves that is killed while it writes over an earlier one."""
    pending = []
    for n in (10, 11):
        local.put(f"{n}.png", picture(n))
        local.collect()
        pending.append(local.pending)
    shutil.copy(f"{pending[1]}/pending.npz", pending[0])
    with pytest.raises(UserError, match=r"pending\.npz: not of the round of pending\.json beside it; run `softteacher"):
        commit(local.state, pending[0], accepted=True)
    assert State.read(local.state).rounds == []
    assert commit(local.state, pending[1], accepted=True)["images"] == 2
