"""The templates of the pages, filled in. Text from outside is escaped; a name that is missing is an error."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Return a template of ``slm_export/data`` filled in; one that ends in ``.html.j2`` escapes what it is given."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Compiling a template takes longer than filling it in, and a command may fill in several."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )


def _source(name: str) -> str:
    return files("slm_export").joinpath("data").joinpath(name).read_text(encoding="utf-8")
