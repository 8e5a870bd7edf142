"""How much personal data is found, by kind, in labelled texts of nine languages (labelled.txt).

    python benchmarks/privacy/anonymiser.py [--ner MODEL] [--misses]

Recall: of what is labelled, how much was found, in whole or in part as the same kind, or in whole as another (it is
gone either way). Precision: of what was found, how much overlaps something labelled. Intervals are Wilson's, 95%.
--misses prints what was not found, and what was found and is nothing.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from slm_export.privacy.entities import KINDS
from slm_export.privacy.finder import Finder, Span

LABELLED = Path(__file__).with_name("labelled.txt")
_MARK = re.compile(r"\{([A-Z_]+)\|([^}]*)\}")


def main() -> None:
    """Print a row per kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ner")
    parser.add_argument("--misses", action="store_true")
    asked = parser.parse_args()
    for row in table(Finder(ner=asked.ner), asked.misses):
        print(row)


def table(finder: Finder, misses: bool = False) -> Iterator[str]:
    """Yield the rows of a Markdown table."""
    wanted, hit, found, right = (Counter[str]() for _ in range(4))
    for text, labels in labelled():
        spans = finder.find(text)
        for label in labels:
            wanted[label.kind] += 1
            if _is_gone(label, spans):
                hit[label.kind] += 1
            elif misses:
                yield f"missed {label.kind}: {text[label.start : label.end]}"
        for span in spans:
            found[span.kind] += 1
            if any(_overlap(span, label) for label in labels):
                right[span.kind] += 1
            elif misses:
                yield f"wrong {span.kind}: {text[span.start : span.end]}"
    yield "| entity | labelled | recall | found | precision |"
    yield "| --- | --- | --- | --- | --- |"
    for kind in KINDS:
        if wanted[kind] or found[kind]:
            yield (
                f"| {kind} | {wanted[kind]} | {_share(hit[kind], wanted[kind])} | {found[kind]} "
                f"| {_share(right[kind], found[kind])} |"
            )
    yield (
        f"| all | {wanted.total()} | {_share(hit.total(), wanted.total())} | {found.total()} "
        f"| {_share(right.total(), found.total())} |"
    )


def labelled() -> Iterator[tuple[str, list[Span]]]:
    """Yield texts, and what is labelled in them."""
    for stored in LABELLED.read_text(encoding="utf-8").splitlines():
        if stored.startswith("#") or not stored:
            continue
        line = stored.replace("¦", "")
        text, labels, at = "", [], 0
        for match in _MARK.finditer(line):
            text += line[at : match.start()]
            assert match[1] in KINDS, match[1]
            labels.append(Span(len(text), len(text) + len(match[2]), match[1], 1.0))
            text += match[2]
            at = match.end()
        yield text + line[at:], labels


def _is_gone(label: Span, spans: Sequence[Span]) -> bool:
    return any(
        (span.kind == label.kind and _overlap(span, label))
        or (span.start <= label.start and label.end <= span.end)
        for span in spans
    )


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end


def _share(part: int, whole: int) -> str:
    if not whole:
        return ""
    p, z = part / whole, 1.96
    middle, width = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole**2))
    low, high = ((middle + sign * width) / (1 + z * z / whole) for sign in (-1, 1))
    return f"{p:.0%} ({max(0.0, low):.0%} to {min(1.0, high):.0%})"


if __name__ == "__main__":
    main()
