"""What may import what. The library knows nothing of KFP and Kubernetes, and its imports run downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "softteacher"
LAYERS = (
    {"errors", "choices", "processors"},
    {"detections"},
    {"overrides"},
    {"console"},
    {"config", "storage", "s3"},
    {"device", "distributed"},
    {"data"},
    {"collecting"},
    {"detectors"},
    {"methods"},
    {"model_folder", "evaluation"},
    {"training"},
    {"watching"},
    {"serving"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")
FORBIDDEN = {"kfp", "kfp_kubernetes", "kubernetes", "components", "pipeline", "tests"}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, with what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_layer():
    assert {part(f) for f in FILES} - {"presets"} == set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(file):
    for name in imports(file):
        top, _, rest = name.partition(".")
        assert top not in FORBIDDEN, f"imports {name}"
        if top == "softteacher" and rest.split(".")[0] in LEVEL:
            assert LEVEL[rest.split(".")[0]] <= LEVEL.get(part(file), 0), f"imports {name}, which lies above it"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_file_is_one_thing(file):
    assert len(file.read_text("utf-8").splitlines()) <= 400
