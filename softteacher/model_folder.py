"""`ModelFolder`: one self-describing folder with teacher, student, settings, classes and where it all came from."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softteacher import storage
from softteacher.choices import Weights
from softteacher.config import Settings, change_settings, read_settings
from softteacher.data.coco import CocoDataset, load_coco
from softteacher.errors import UserError

if TYPE_CHECKING:  # a folder is checked and copied where there is no PyTorch, too
    import torch

    from softteacher.detectors.base import Detector

WEIGHTS: tuple[Weights, Weights] = ("teacher", "student")
FILES = ("student.pt", "teacher.pt", "settings.yaml", "classes.json")


class ModelFolder:
    """A trained model on local disk.

    Files: `teacher.pt`, `student.pt` (state dicts), `settings.yaml`, `classes.json`, `validation.json` (manifest),
    `training.jsonl`, TensorBoard events, `metrics.json`, and `provenance.json`, which is written last and holds the
    sha256 of the weights: a folder without it is torn.

    Args:
        path: local folder.
        name: what errors call it, where the folder is a download.
        overrides: settings on top of its own, see `change_settings`.

    Raises:
        UserError: it is torn, changed, or not a model folder; or a setting can't be changed.
    """

    def __init__(self, path: str | Path, name: str | None = None, overrides: Sequence[str] = ()) -> None:
        self.path, self.name = Path(path), name or str(path)
        if not (self.path / "provenance.json").is_file():
            what = "torn" if (self.path / "settings.yaml").exists() else "no model folder"
            raise UserError(
                f"{self.name}: is {what}: no provenance.json; give the folder that `softteacher train` wrote"
            )
        self.provenance = self._json("provenance.json")
        if not isinstance(self.provenance, dict) or not isinstance(self.provenance.get("sha256"), dict):
            raise UserError(f"{self.name}: provenance.json is not ours; give the folder that `softteacher train` wrote")
        for file in FILES:
            if not (self.path / file).is_file() or sha256(self.path / file) != self.provenance["sha256"].get(file):
                where = storage.join(self.name, file)
                raise UserError(f"{where}: missing or changed since the training; copy the whole model folder again")
        self.overrides = list(overrides)
        self.settings: Settings = change_settings(read_settings(self.path / "settings.yaml"), overrides)
        classes = self._json("classes.json")
        try:
            self.categories: list[tuple[int, str]] = [(int(c["id"]), str(c["name"])) for c in classes]
        except (TypeError, KeyError, ValueError, OverflowError):
            raise UserError(f"{self.name}: classes.json is not ours; copy the whole model folder again") from None

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return [name for _, name in self.categories]

    def detector(self, weights: Weights) -> Detector:
        """The detector with the teacher's or the student's weights, in eval mode on the CPU.

        Raises:
            UserError: the weights don't fit the settings.
        """
        import torch

        from softteacher.detectors.build import build

        detector = build(self.settings.detector, len(self.categories), load_backbone=False)
        file = self.path / f"{weights}.pt"
        try:
            detector.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as e:  # a file that isn't ours can make the unpickler raise anything
            what = f"these are no weights for its settings ({type(e).__name__})"
            where = storage.join(self.name, file.name)
            raise UserError(f"{where}: {what}; copy the whole model folder again") from None
        return detector.eval()

    def validation(self) -> CocoDataset:
        """The validation set that the model was trained with."""
        return load_coco(str(self.path / "validation.json"))

    def metrics(self) -> dict[str, Any]:
        """The scores of teacher and student on that set.

        Raises:
            UserError: `metrics.json` is missing or broken.
        """
        return dict(self._json("metrics.json"))

    @staticmethod
    def write(
        path: Path,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        settings: Settings,
        validation: CocoDataset,
        metrics: dict[str, Any],
        provenance: dict[str, Any],
    ) -> None:
        """Write a model into a folder; `provenance.json` comes last."""
        import torch

        path.mkdir(parents=True, exist_ok=True)
        for name, module in (("student", student), ("teacher", teacher)):
            # torch.save to a full disk raises errors of its own
            buffer = io.BytesIO()
            torch.save({k: v.cpu().contiguous() for k, v in module.state_dict().items()}, buffer)
            storage.write_bytes(path / f"{name}.pt", buffer.getbuffer())
        (path / "settings.yaml").write_text(settings.to_yaml())
        (path / "classes.json").write_text(json.dumps([{"id": i, "name": n} for i, n in validation.categories]))
        validation.save(path / "validation.json")
        (path / "metrics.json").write_text(json.dumps(metrics, indent=1))
        digests = {name: sha256(path / name) for name in FILES}
        storage.write_bytes(path / "provenance.json", json.dumps({**provenance, "sha256": digests}, indent=1).encode())

    def copy_provenance(self, folder: Path) -> None:
        """Hand provenance and validation manifest on to what is made from this model."""
        for name in ("provenance.json", "validation.json"):
            shutil.copyfile(self.path / name, folder / name)

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            where = storage.join(self.name, name)
            raise UserError(f"{where}: missing or broken json; copy the whole model folder again") from None


def sha256(path: str | Path) -> str:
    """sha256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin(init_from: str) -> dict[str, str]:
    """Which weights a detector starts from.

    Args:
        init_from: as in the settings: model folder or state dict (.pt, .pth), local or `s3://`.

    Returns:
        `source`, that is `init_from`, and `sha256` of the weights, in a model folder the teacher's.

    Raises:
        UserError: they are not there.
    """
    file = init_from if init_from.endswith((".pt", ".pth")) else storage.join(init_from, "teacher.pt")
    with storage.local_input(file) as path:
        return {"source": init_from, "sha256": sha256(path)}
