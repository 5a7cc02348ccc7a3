"""HTML pages without any outside reference, in one look."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page as a string of HTML.

    Args:
        template: path below the package; it extends `evaluation/page.html`.
        values: all that it names; one that is missing is an error.
    """
    loader = jinja2.FunctionLoader(lambda name: files("softteacher").joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(**values)


def inline(picture: bytes, kind: str = "png") -> str:
    """The `src` of a picture that is part of the page."""
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()
