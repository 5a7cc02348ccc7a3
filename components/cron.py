"""Cron expressions as Kubeflow Pipelines wants them: six fields, seconds first, read by Go's robfig/cron."""

import re
from datetime import UTC, datetime

from croniter import CroniterError, croniter

from softteacher.errors import UserError

EXAMPLE = 'for example "0 3 * * MON" for Mondays at 3'
NAMES = "JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC|SUN|MON|TUE|WED|THU|FRI|SAT"
WORD = rf"\d+|{NAMES}"
ITEM = re.compile(rf"(\*|\?|(?P<low>{WORD})(-(?P<high>{WORD}))?)(/[1-9]\d*)?", re.IGNORECASE)


def kfp_cron(text: str) -> str:
    """Six fields from five (minute, hour, day, month, weekday) or six (seconds first).

    What other crons know and KFP's doesn't is refused here, as the server would take it and then never start a run:
    weekday 7, ranges that go backwards, L, W and #. `@daily` and the like are written out.

    Raises:
        UserError: it isn't a cron expression, or has no date that ever comes.

    Example:
        >>> kfp_cron("0 3 * * MON")
        '0 0 3 * * MON'
    """
    words = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0"}
    words |= {"@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}
    fields = words.get(text.strip().lower(), text).split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise UserError(f"--cron {text}: needs five fields (minute, hour, day, month, weekday), {EXAMPLE}")
    for n, field in enumerate(fields):
        for item in field.split(","):
            found = ITEM.fullmatch(item)
            if not found:
                raise UserError(f"--cron {text}: {item} is nothing that KFP understands; {EXAMPLE}")
            ends = [
                int(end) if end.isdigit() else NAMES.index(end.upper()) for end in found.group("low", "high") if end
            ]
            if ends != sorted(ends):
                raise UserError(f"--cron {text}: {item} goes backwards, which KFP does not understand; split it in two")
            if n == 5 and "7" in found.group("low", "high"):
                raise UserError(f"--cron {text}: KFP's weekdays are 0 (Sunday) to 6; write 0 for Sunday")
    cron = " ".join(fields)
    try:
        next_time(cron)
    except CroniterError as error:
        raise UserError(f"--cron {text}: {str(error).split(';')[0]}; {EXAMPLE}") from None
    return cron


def next_time(cron: str, after: datetime | None = None) -> datetime:
    """When a run starts next, in UTC, which is KFP's time zone unless its controller was told another one.

    Args:
        cron: Six fields, as `kfp_cron` gives them.
        after: Only later times; none: than now.
    """
    found = croniter(cron, after or datetime.now(UTC), second_at_beginning=True).get_next(datetime)
    assert isinstance(found, datetime)
    return found
