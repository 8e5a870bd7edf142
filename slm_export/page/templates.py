"""The templates of the pages, filled in. Text from outside is escaped; a name that is missing is an error."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render(template: str, **values: Any) -> str:
    """Return a template of ``slm_export/data`` filled in; one that ends in ``.html.j2`` escapes what it is given."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )
    return environment.get_template(template).render(**values)


def _source(name: str) -> str:
    return files("slm_export").joinpath("data").joinpath(name).read_text(encoding="utf-8")
