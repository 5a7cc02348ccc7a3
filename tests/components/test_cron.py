"""Cron expressions as KFP understands them."""

from datetime import UTC, datetime

import pytest

from components.cron import kfp_cron, next_time
from softteacher.errors import UserError


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("0 3 * * MON", "0 0 3 * * MON"),
        ("  */15 8-18 * * mon-fri ", "0 */15 8-18 * * mon-fri"),
        ("30 0 3 1,15 * ?", "30 0 3 1,15 * ?"),
        ("@daily", "0 0 0 * * *"),
        ("0 0 1 JAN-MAR/2 *", "0 0 0 1 JAN-MAR/2 *"),
    ],
)
def test_cron(given, fields):
    assert kfp_cron(given) == fields


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "needs five fields"),
        ("* * * *", "needs five fields"),
        ("61 * * * *", "out of range"),
        ("0 3 31 2 *", "next date"),
        ("0 3 * * 7", "write 0 for Sunday"),
        ("0 3 * * 5-7", "write 0 for Sunday"),
        ("0 22-2 * * *", "goes backwards"),
        ("0 3 * * FRI-MON", "goes backwards"),
        ("0 3 L * *", "L is nothing that KFP understands"),
        ("0 3 * * 1#2", "1#2 is nothing"),
        ("0 3 * * 1;reboot", "is nothing"),
        ("@reboot", "needs five fields"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(UserError, match=message) as told:
        kfp_cron(given)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith("--cron ")


def test_next_time():
    thursday = datetime(2026, 11, 26, 10, tzinfo=UTC)
    assert next_time("0 0 3 * * MON", thursday) == datetime(2026, 11, 30, 3, tzinfo=UTC)
    assert next_time("30 */15 * * * *", thursday) == datetime(2026, 11, 26, 10, 0, 30, tzinfo=UTC)
