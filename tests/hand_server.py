"""A real Triton over a local repository in which tests put models by hand, without `deploy`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softteacher.demo.servers import TritonUrls, triton
from softteacher.serving.connection import connect
from softteacher.serving.deploy import PYTHON_FILES
from softteacher.serving.repository import config, read_onnx_folder
from tests.helpers import onnx_folder


class HandServer:
    """A Triton over a local repository, to put models in by hand."""

    def __init__(self, urls: TritonUrls, repository: Path, scratch: Path) -> None:
        self.urls, self.repository, self._scratch = urls, repository, scratch

    def url(self, protocol: str) -> str:
        host = self.urls.http.removeprefix("http://")
        return {"http": self.urls.http, "bare": host, "grpc": self.urls.grpc}[protocol]

    def put(self, name: str, version: int = 1, canary: dict | None = None, **detector: Any) -> None:
        """Make a square detector the one version of a model that is served."""
        folder = onnx_folder(self._scratch / f"{name}-{version}", **detector)
        target = self.repository / name / str(version)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "model.onnx", target)
        for file, source in PYTHON_FILES.items():
            shutil.copy(source, target / file)
        text = config(read_onnx_folder(folder), version)
        if canary:
            text += f'\nparameters {{ key: "canary" value {{ string_value: {json.dumps(json.dumps(canary))} }} }}\n'
        (self.repository / name / "config.pbtxt").write_text(text)
        self.load(name)

    def load(self, name: str, unload: bool = False) -> None:
        server = connect(self.urls.http, 60)
        (server.unload_model if unload else server.load_model)(name)
        server.close()


@contextmanager
def hand_server(folder: Path) -> Iterator[HandServer]:
    """Triton for the time of the block; everything it needs is in `folder`."""
    (folder / "models").mkdir()
    with triton(str(folder / "models"), folder) as urls:
        yield HandServer(urls, folder / "models", folder / "onnx")
