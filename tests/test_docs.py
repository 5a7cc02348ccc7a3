"""README, CONTRIBUTING and docs/: what they link, name, quote and tell to type is there."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import pipeline
from softteacher.cli import app
from softteacher.config import Settings, load_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
FOLDERS = "softteacher|components|docs|tests|benchmarks|images|manifests"
GROUPS = {"softteacher": typer.main.get_command(app), "pipeline.py": typer.main.get_command(pipeline.app)}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's shell blocks; Python between quotes is one word."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S):
        words: list[str] = []
        for line in re.sub(r"\\\n", " ", block).splitlines(keepends=True):
            words.append(line)
            try:
                found = shlex.split("".join(words), comments=True)
            except ValueError:  # the quote is not closed yet
                continue
            words = []
            for part in " ".join(shlex.quote(w) for w in found).split(" && "):
                if part:
                    yield shlex.split(part)
        assert not words, f"{page.name}: a quote is not closed in {block}"


@pages
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pages
def test_named_files(page):
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*?(?:/|\.\w+))`", prose(page)):
        assert (ROOT / name).exists(), name


@pages
def test_named_settings(page):
    known = {f"{group}.{key}" for group, part in Settings() for key in type(part).model_fields}
    named = set(re.findall(r"`((?:data|detector|method|training|export)\.[a-z]\w*)(?=[`=])", prose(page)))
    assert named - {"training.jsonl"} <= known


def check_options(command: Any, words: list[str]) -> None:
    while hasattr(command, "commands") and words[:1] not in ([], ["--help"]):
        command, words = command.commands[words[0]], words[1:]
    known = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
    given = [w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)]
    assert set(given) <= known, words
    pairs = list(itertools.pairwise(words))
    load_settings(dict(pairs).get("--preset"), [value for word, value in pairs if word == "--set"])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equal, value = word.partition("=")
        assert re.search(rf"^{name} [?:]?=" if equal else rf"^{name}:", makefile, flags=re.M), word
        if name == "SET":
            load_settings(None, value.split())


@pages
def test_commands(page):
    for words in commands(page):
        names = [Path(w).name for w in words]
        if names[0] == "make":
            check_make(words[1:])
        elif words[0].startswith("python") and words[1].startswith("benchmarks/"):
            script = (ROOT / words[1]).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
            assert all(f'"{w}"' in script for w in words if w.startswith("--")), words
        elif "softteacher" in names or "pipeline.py" in names:
            at = next(n for n, name in enumerate(names) if name in GROUPS)
            check_options(GROUPS[names[at]], words[at + 1 :])


def test_quoted_messages_exist():
    """What the first column of docs/troubleshooting.md quotes, `...` and numbers aside, is in the code."""
    files = [*ROOT.glob("softteacher/**/*.py"), ROOT / "images" / "triton-venv.sh"]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(f.read_text("utf-8") for f in files))
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quotes = [quote for quote in re.findall(r"^\| `([^`]+)`", text, flags=re.M) if " " in quote]
    assert len(quotes) > 25
    for quote in quotes:
        for part in re.split(r"\.\.\.|\d+\.\d+", quote):
            assert part.strip(" ();,") in code, quote
