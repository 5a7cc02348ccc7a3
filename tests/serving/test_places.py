"""Where a repository may begin, and where records may not lie."""

from pathlib import Path

import pytest

from softteacher.errors import UserError
from softteacher.serving.places import check_registry, check_repository


def test_a_repository_may_begin_beside_what_is_there(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for good in (str(tmp_path), f"{tmp_path}/new", f"{tmp_path}/new/", "new", s3, f"{s3}/models/new"):
        check_repository(good)
    for bad in (f"{tmp_path}/nowhere/new", "nowhere/new", "file", "file/new"):
        with pytest.raises(UserError, match=f"{bad}: no such folder, nor one around it; check --repository"):
            check_repository(bad)
    with pytest.raises(UserError, match="s3://no-such-bucket/models: no such bucket"):
        check_repository("s3://no-such-bucket/models")


def test_records_lie_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for registry, repository in (
        ("models/registry", "models"),
        ("models", "models/"),
        ("./models/registry", "models"),
        ("models/registry", f"{tmp_path}/models"),
        ("link/registry", "models"),
        ("other/../models/registry", "models"),
        ("s3://bucket/models/registry/", "s3://bucket/models/"),
    ):
        with pytest.raises(UserError, match=f"--registry {registry}: is in Triton's repository"):
            check_registry(registry, repository)
    for registry in ("", "models-2", "registry", "s3://bucket/models"):
        check_registry(registry, "models")
