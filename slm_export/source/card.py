"""The front matter of a model card: README.md of a model's folder."""

from __future__ import annotations

import re
from pathlib import Path


def front_matter(folder: Path) -> str:
    """Return the YAML between two lines of dashes that a model card begins with; empty where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return found[1] if found else ""


def listed(key: str, card: str) -> list[str]:
    """Return what a key of the front matter says: a text, [a, b], or a line for each that begins with a dash."""
    found = re.search(rf"^{key}: *(.*(?:\n *- .*)*)", card, re.MULTILINE)
    parts = re.split(r"\n *- |,", found[1].strip(" []")) if found else []
    return [name for part in parts if (name := part.strip(" '\""))]
