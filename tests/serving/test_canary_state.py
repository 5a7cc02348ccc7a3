"""The canary's state in the repository, and its share."""

import json
import re
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving.canary_state import Canary, parse_share, read_canary, write_canary


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), ("2.5%", 0.025), ("99%", 0.99)])
def test_share(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["10", "0", "0%", "100%", "1", "-5%", "nan", "ten", "%", ""])
def test_no_share(text: str) -> None:
    with pytest.raises(UserError, match=rf"--canary {text}: is no share of the requests; write 10% or 0.1"):
        parse_share(text)


def test_state_is_written_once(s3: str) -> None:
    assert read_canary(s3, "cards") is None
    write_canary(s3, "cards", Canary(3, 0.1))
    assert read_canary(s3, "cards") == Canary(3, 0.1)
    with pytest.raises(storage.Conflict):
        write_canary(s3, "cards", Canary(4, 0.2))
    assert read_canary(s3, "cards") == Canary(3, 0.1)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 3}'])
def test_torn_state(content: str, tmp_path: Path) -> None:
    (tmp_path / "cards-canary").mkdir()
    (tmp_path / "cards-canary" / "canary.json").write_text(content)
    with pytest.raises(UserError, match=r"canary\.json: torn, or not ours"):
        read_canary(str(tmp_path), "cards")


def test_parameter_of_the_config() -> None:
    line = Canary(3, 0.1).parameter().decode()
    value = re.fullmatch(r'parameters { key: "canary" value { string_value: (".*") } }\n', line)
    assert value
    assert json.loads(json.loads(value[1])) == {"share": 0.1, "version": 3}
