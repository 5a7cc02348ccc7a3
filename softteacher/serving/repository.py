"""The onnx folder that goes in, and the Triton model repository that comes out.

{repository}/{name}/config.pbtxt        names the one live version
                    champion.json       the champion pointer: which version, how good, on what data
                    last_version        the highest number that was ever drawn; none is twice
                    {version}/          model.onnx, model.py (python backend), and what a rollback needs: config.pbtxt,
                                        smoke.npz, manifest.json (see version_folder.py)
{repository}/{name}-candidate/          a version before its smoke test, and claim.json: who is deploying
{repository}/{name}-canary/             a version that gets a share of the requests (see canary_state.py)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.choices import Backend
from softteacher.errors import UserError
from softteacher.model_folder import sha256
from softteacher.serving.outputs import MASKS, OUTPUTS
from softteacher.serving.places import check_repository

INT8_FILE = "model.int8.onnx"
LAST_VERSION = "last_version"
REFERENCE_ENGINE = "onnxruntime-fp32"  # whose answers `smoke.npz` records


@dataclass(frozen=True)
class Runtime:
    """How Triton runs a model.

    Attributes:
        backend: Triton's: `python` (the embedded one, which runs every engine), `onnxruntime` or `openvino`.
        engine: engine and precision, as `export.engines` and `parity.json` name them.
        gpu: on the GPUs that Triton sees.
        tensorrt: there by TensorRT in fp16 instead of CUDA.

    Raises:
        UserError: the parts don't fit together.
    """

    backend: Backend = "python"
    engine: str = REFERENCE_ENGINE
    gpu: bool = False
    tensorrt: bool = False

    def __post_init__(self) -> None:
        name = self.library
        if self.backend not in {"python", name}:
            raise UserError(f"--engine {self.engine}: Triton's backend {self.backend} can't run it; --backend {name}")
        if self.gpu and name != "onnxruntime":
            raise UserError(f"--engine {self.engine}: does not run on GPUs; use onnxruntime-fp32")
        if self.tensorrt and not (self.gpu and self.backend == "onnxruntime"):
            raise UserError("--tensorrt: needs --gpu and --backend onnxruntime")

    @property
    def library(self) -> str:
        """onnxruntime or openvino."""
        return self.engine.partition("-")[0]

    @property
    def precision(self) -> str:
        """fp32, bf16 or int8."""
        return self.engine.partition("-")[2]

    @property
    def served(self) -> str:
        """What answers, as the champion pointer names it: the engine, or `tensorrt-fp16`."""
        return "tensorrt-fp16" if self.tensorrt else self.engine

    @property
    def onnx_file(self) -> str:
        """The file of the onnx folder that it runs."""
        return INT8_FILE if self.precision == "int8" else "model.onnx"


@dataclass(frozen=True)
class OnnxFolder:
    """What `export` wrote, checked.

    Attributes:
        path: the folder, local.
        sha256: of model.onnx.
        ap: ONNX Runtime's AP on the validation set.
        validation_fingerprint: of that set.
        provenance: as training wrote it.
        image_size: height and width of the input.
        max_detections: K, the rows of every output.
        masks: it answers masks, too.
        categories: `{"id", "name"}` in label order.
        preprocessing: how an image becomes input.
        engines: what the export measured of each engine, see `softteacher.serving.variants`.
        overrides: settings that the export had on top of the model's.
    """

    path: Path
    sha256: str
    ap: float
    validation_fingerprint: str
    provenance: dict[str, Any]
    image_size: tuple[int, int]
    max_detections: int
    masks: bool
    categories: list[dict[str, Any]]
    preprocessing: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    overrides: list[str] = field(default_factory=list)

    def require(self, runtime: Runtime) -> None:
        """Refuse an engine that the export did not find good.

        Raises:
            UserError: it was not measured, or it must not serve, or not so.
        """
        engine = runtime.engine
        facts = self.engines.get(engine)
        if engine != REFERENCE_ENGINE and facts is None:
            raise UserError(
                f"{self.path}: {engine} was not measured at export; add it to export.engines: "
                f"softteacher export --set export.engines=[{engine}] ..."
            )
        if facts and "refused" in facts:
            raise UserError(f"{self.path}: {engine} must not serve this model: {facts['refused']}")
        if facts and "fp32_until" in facts and runtime.backend != "python":
            raise UserError(
                f"{self.path}: {engine} keeps this model's AP only with its first layers in fp32, which Triton's own"
                " backend can't do; --backend python, or --engine openvino-fp32"
            )


@dataclass(frozen=True)
class Champion:
    """The champion pointer: the live version of a model, and the older ones that a rollback can go to, newest first.

    `run` is the id of the pipeline run that deployed it, empty if none did.
    """

    name: str
    version: int
    previous: list[int]
    ap: float
    validation_fingerprint: str
    onnx_sha256: str
    deployed_at: str
    deployed_by: str
    provenance: dict[str, Any]
    engine: str = REFERENCE_ENGINE
    run: str = ""

    def to_json(self) -> bytes:
        """As `champion.json` has it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Champion:
        """Of what `champion.json` or a manifest has; what a newer release added is left out.

        Raises:
            TypeError: it lacks something.
        """
        return cls(**{f.name: tree[f.name] for f in fields(cls) if f.name in tree})


def read_onnx_folder(path: Path) -> OnnxFolder:
    """Check an onnx folder and read what deploying it needs.

    Raises:
        UserError: a file is missing or torn, or the ONNX file isn't valid, or not the one `parity.json` was made for.
    """
    again = "run `softteacher export` again"
    for name in ("model.onnx", "parity.json", "smoke.npz", "provenance.json", "validation.json"):
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name} in it; it is not the whole output of `softteacher export`")
    parity, provenance, validation = (_json(path / f"{n}.json") for n in ("parity", "provenance", "validation"))
    file, found = path / "model.onnx", {name: sha256(path / name) for name in ("model.onnx", "smoke.npz")}
    # an older release did not write down that of smoke.npz
    told = {"model.onnx": parity.get("onnx_sha256"), "smoke.npz": parity.get("smoke_sha256", found["smoke.npz"])}
    if changed := [name for name in found if found[name] != told[name]]:
        raise UserError(f"{path / changed[0]}: is not the file that parity.json was made for (sha256 differs); {again}")
    try:
        import onnx

        onnx.checker.check_model(str(file))
        graph = onnx.load(file, load_external_data=False)
    except Exception as e:  # protobuf's and onnx's own errors share no base
        raise UserError(f"{file}: not a valid ONNX file ({str(e).splitlines()[0]}); {again}") from None
    outputs = {o.name for o in graph.graph.output}
    if [i.name for i in graph.graph.input] != ["images"] or not outputs.issuperset(OUTPUTS):
        raise UserError(f"{file}: needs the input images and the outputs {', '.join(OUTPUTS)}; {again}")
    for weight in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise UserError(f"{file}: its weights hold NaN ({weight.name}); train again, with a lower training.lr")
    try:
        ours = ("classes", "preprocessing", "max_detections")
        facts = {p.key: json.loads(p.value) for p in graph.metadata_props if p.key in ours}
        height, width = facts["preprocessing"]["image_size"]
        return OnnxFolder(
            path=path,
            sha256=found["model.onnx"],
            ap=float(parity["ap"]["onnxruntime"]),
            validation_fingerprint=str(validation["softteacher"]["fingerprint"]),
            provenance=provenance,
            image_size=(int(height), int(width)),
            max_detections=int(facts["max_detections"]),
            masks=MASKS in outputs,
            categories=facts["classes"],
            preprocessing=facts["preprocessing"],
            engines=dict(parity.get("engines", {})),
            overrides=list(parity.get("overrides", [])),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: model.onnx, parity.json or validation.json lacks {e}; {again}") from None


def config(
    model: OnnxFolder,
    version: int,
    runtime: Runtime = Runtime(),
    *,
    max_batch_size: int = 8,
    queue_delay_us: int | None = None,
) -> str:
    """The `config.pbtxt` that makes `version` the only one served.

    Args:
        model: the onnx folder of that version.
        version: the live version.
        runtime: what runs it.
        max_batch_size: images in one run of the detector.
        queue_delay_us: how long a request may wait for others to share its batch; none: 2000 on GPUs, which gain by
            larger batches, and 0 on processors, which don't. What comes while a batch runs is the next batch anyway.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    # a JSON string of ASCII is a string of protobuf's text format too
    environment.filters["quoted"] = lambda value: json.dumps(json.dumps(value))
    template = environment.from_string(Path(__file__).with_name("config.pbtxt.j2").read_text())
    height, width = model.image_size
    preferred = sorted({max(1, max_batch_size // 2), max_batch_size})
    delay = (2000 if runtime.gpu else 0) if queue_delay_us is None else queue_delay_us
    return template.render(
        runtime=runtime,
        version=version,
        engine={
            "engine": runtime.library,
            "precision": runtime.precision,
            "fp32_until": model.engines.get(runtime.engine, {}).get("fp32_until", ""),
        },
        height=height,
        width=width,
        max_detections=model.max_detections,
        masks=model.masks,
        max_batch_size=max_batch_size,
        preferred_batch_sizes=preferred,
        warm_up_sizes=sorted({1, *preferred}),
        queue_delay_us=delay,
        classes=model.categories,
        preprocessing=model.preprocessing,
    )


def parse_config(text: bytes) -> Any:
    """Triton's own `ModelConfig` message of a `config.pbtxt`.

    Raises:
        UserError: it is none.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as e:
        raise UserError(f"config.pbtxt: torn, or not ours ({' '.join(str(e).split())}); deploy again") from None


def versions(repository: str, name: str) -> list[int]:
    """The versions of a model that have files in the repository, ascending.

    Raises:
        UserError: the repository can't be read, e.g. there is no such bucket.
    """
    folder = storage.join(repository, name)
    if not storage.exists(folder):
        return []
    folders = {file.name.split("/")[0] for file in storage.list_files(folder)}
    return sorted(int(f) for f in folders if f.isdecimal())


def last_version(repository: str, name: str) -> int:
    """The highest number that a deployment of a model has drawn; 0 if none has.

    Raises:
        UserError: the repository can't be read.
    """
    uri = storage.join(repository, name, LAST_VERSION)
    try:
        last = int(storage.read_bytes(uri))
    except storage.MissingFile:
        last = 0
    except ValueError:
        raise UserError(f"{uri}: torn, or not ours; write the highest version that was ever deployed into it") from None
    return max([last, *versions(repository, name)])


def draw_version(repository: str, name: str) -> int:
    """A number for a new version that no other deployment has had, not even one that failed or a canary that is gone:
    replicas, clients and records tell models by it.

    Raises:
        storage.Conflict: somebody else draws at this moment (on S3).
        UserError: the repository can't be read or written.
    """
    uri = storage.join(repository, name, LAST_VERSION)
    etag = storage.etag(uri)
    version = last_version(repository, name) + 1
    storage.write_bytes(uri, str(version).encode(), if_match=etag)
    return version


def read_champion(repository: str, name: str) -> Champion | None:
    """The champion pointer of a model; none if it was never deployed.

    Raises:
        UserError: it can't be read, or is torn, or there can't be a repository (see `check_repository`).
    """
    uri = storage.join(repository, name, "champion.json")
    try:
        data = storage.read_bytes(uri)
    except storage.MissingFile:
        check_repository(repository)
        return None
    try:
        return Champion.from_tree(json.loads(data))
    except (TypeError, ValueError):
        raise UserError(
            f"{uri}: torn, or not ours; restore it from `record` in manifest.json of the live version"
        ) from None


def write_champion(repository: str, champion: Champion, if_match: str) -> None:
    """Set the champion pointer, unless somebody else did meanwhile (on S3).

    Args:
        repository: the model repository.
        champion: what to write.
        if_match: `champion_etag` from before.

    Raises:
        storage.Conflict: somebody else did.
        UserError: it can't be written.
    """
    storage.write_bytes(storage.join(repository, champion.name, "champion.json"), champion.to_json(), if_match=if_match)


def champion_etag(repository: str, name: str) -> str:
    """For `write_champion`; take it before `read_champion`."""
    return storage.etag(storage.join(repository, name, "champion.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as e:
        raise UserError(f"{path}: broken JSON ({e}); run `softteacher export` again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; run `softteacher export` again")
    return value
