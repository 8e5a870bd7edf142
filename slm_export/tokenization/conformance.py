"""Does the app's tokenizer read text as the model's own does?

A runtime brings its own reimplementation of a tokenizer. Where the two part, the model is asked a
question in a spelling that it was never trained on, and nothing crashes: it only answers worse. So some
thousands of strings go through both, chosen where implementations are known to part.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slm_export.evaltext import load_documents, load_sentences
from slm_export.tokenization import conformance_strings as strings

EXAMPLES_PER_KIND = 3
KINDS_IN_SUMMARY = 6
_SEED = 20240229


@dataclass(frozen=True)
class Case:
    """A string to tokenize, and what it is an example of."""

    kind: str
    text: str


@dataclass(frozen=True)
class Example:
    """A string on which the two part. ``runtime`` is None where the runtime failed; ``problem`` says how."""

    kind: str
    text: str
    source: tuple[int, ...]
    runtime: tuple[int, ...] | None
    problem: str


@dataclass(frozen=True)
class Conformance:
    """How many strings the runtime's tokenizer reads otherwise than the source's, and which."""

    total: int
    mismatches: int
    by_kind: dict[str, tuple[int, int]]
    """Kind of text: how many parted, of how many."""
    examples: tuple[Example, ...]

    @property
    def agreed(self) -> bool:
        """Whether nothing parted."""
        return self.mismatches == 0

    def summary(self, who: str = "the runtime's tokenizer") -> str:
        """Say in a sentence or two on what text the tokenizers part."""
        if self.agreed:
            return f"{who} agrees with the source's on all {self.total:,} strings"
        parted = sorted(
            ((wrong, of, kind) for kind, (wrong, of) in self.by_kind.items() if wrong),
            key=lambda row: (-row[0] / row[1], row[2]),
        )
        named = [f"{kind} ({wrong} of {of})" for wrong, of, kind in parted[:KINDS_IN_SUMMARY]]
        if len(parted) > KINDS_IN_SUMMARY:
            named.append(f"and {len(parted) - KINDS_IN_SUMMARY} more kinds of text")
        first = next(example for example in self.examples if example.kind == parted[0][2])
        return (
            f"{who} parts from the source's on {self.mismatches:,} of {self.total:,} "
            f"strings: {', '.join(named)}; for example {_short(repr(first.text))}: {first.problem}"
        )


def cases(
    special_tokens: Sequence[str] = (),
    chat_template_render: Sequence[str] = (),
    vocabulary_sample: Sequence[str] = (),
) -> tuple[Case, ...]:
    """Return the strings to compare on: the same for the same arguments, each string once.

    Given   the tokenizer's added tokens, rendered chats, and texts of single tokens
    Result  some thousands of cases, a kind each
    """
    parts = (
        _fixed(),
        _normal_forms(),
        _whitespace(),
        _numbers(),
        _long_words(),
        _special(special_tokens),
        (Case("chat-template", text) for text in chat_template_render),
        _vocabulary(vocabulary_sample),
        _sample_lines(),
        _mixtures(special_tokens, 1000),
    )
    unique: dict[str, Case] = {}
    for part in parts:
        for case in part:
            unique.setdefault(case.text, case)
    return tuple(unique.values())


def compare(
    source_encode: Callable[[str], list[int]],
    runtime_encode: Callable[[str], list[int]],
    source_decode: Callable[[Sequence[int]], str],
    runtime_decode: Callable[[Sequence[int]], str] | None,
    cases: Sequence[Case],
) -> Conformance:
    """Run every case through both tokenizers: the ids first, then the text that the source's ids give back.

    ``source_encode`` must add nothing around the text. An exception of the runtime is a mismatch with its
    message; one of the source is an error of ours, and is not caught.
    """
    wrong: dict[str, int] = {}
    of: dict[str, int] = {}
    examples: list[Example] = []
    for case in cases:
        of[case.kind] = of.get(case.kind, 0) + 1
        expected = source_encode(case.text)
        runtime, problem = _ids(case.text, expected, runtime_encode)
        if problem is None and runtime_decode is not None:
            problem = _text_problem(expected, source_decode, runtime_decode)
        if problem is None:
            continue
        wrong[case.kind] = wrong.get(case.kind, 0) + 1
        if wrong[case.kind] <= EXAMPLES_PER_KIND:
            ids = None if runtime is None else tuple(runtime)
            examples.append(Example(case.kind, case.text, tuple(expected), ids, problem))
    by_kind = {kind: (wrong.get(kind, 0), count) for kind, count in of.items()}
    return Conformance(len(cases), sum(wrong.values()), by_kind, tuple(examples))


def _ids(
    text: str, expected: list[int], runtime_encode: Callable[[str], list[int]]
) -> tuple[list[int] | None, str | None]:
    """Return the runtime's ids, and what is wrong with them if anything is."""
    try:
        ids = list(runtime_encode(text))
    except Exception as error:  # noqa: BLE001 - whatever it is, an app would meet it too
        return None, f"the runtime fails: {str(error) or type(error).__name__}"
    if ids == expected:
        return ids, None
    pairs = enumerate(zip(expected, ids, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(ids)))
    return ids, (
        f"from token {at} on, the source has {_short(expected[at : at + 8])} "
        f"and the runtime {_short(ids[at : at + 8])}"
    )


def _text_problem(
    ids: list[int],
    source_decode: Callable[[Sequence[int]], str],
    runtime_decode: Callable[[Sequence[int]], str],
) -> str | None:
    """Return how the two part in turning ids back to text, or None."""
    expected = source_decode(ids)
    try:
        text = runtime_decode(ids)
    except Exception as error:  # noqa: BLE001 - whatever it is, an app would meet it too
        return f"the runtime fails to decode: {str(error) or type(error).__name__}"
    # Of a whole text the decoder takes the space before the first word off; a stream of tokens cannot know.
    if text in (expected, f" {expected}"):
        return None
    return f"the ids agree, but the runtime shows {_short(repr(text))} for {_short(repr(expected))}"


def _fixed() -> Iterator[Case]:
    """Yield the written samples: each alone, after a space, and doubled."""
    for kind, texts in strings.BY_KIND.items():
        for text in texts:
            for form in (text, " " + text, text + "\n" + text):
                yield Case(kind, form)


def _normal_forms() -> Iterator[Case]:
    """Yield text composed and decomposed: NFC, NFD, NFKC, NFKD."""
    texts = strings.BY_KIND["scripts"] + strings.COMPOSED
    for text in texts:
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            yield Case("normal-forms", unicodedata.normalize(form, text))


def _whitespace() -> Iterator[Case]:
    """Yield runs of every white space, before, between and after words."""
    for space in strings.SPACES:
        for count in (1, 2, 3, 4, 7, 8, 16, 33):
            run = space * count
            yield Case("whitespace", run)
            yield Case("whitespace", f"{run}word")
            yield Case("whitespace", f"word{run}")
            yield Case("whitespace", f"two{run}words")
    rng = random.Random(_SEED)
    for _ in range(100):
        run = "".join(rng.choices(strings.SPACES, k=rng.randint(2, 8)))
        yield Case("whitespace", f"if x:{run}return{run}")


def _numbers() -> Iterator[Case]:
    """Yield digits in runs of every length, and numbers as people write them."""
    digits = "31415926535897932384626433832795028841971693993751"
    for length in range(1, 31):
        yield Case("numbers", digits[:length])
        yield Case("numbers", f"x = -{digits[:length]}.{digits[:length]}")
    rng = random.Random(_SEED)
    for _ in range(80):
        value = rng.randrange(10 ** rng.randint(1, 12))
        yield Case("numbers", rng.choice(strings.NUMBER_FORMS).format(value))


def _long_words() -> Iterator[Case]:
    """Yield words without a break, up to a length where a limit on word length shows."""
    for unit in ("a", "ab", "Donaudampfschifffahrt", "=", "-", "ha", "é", "語", "🙂", "x1"):
        for length in (10, 50, 99, 100, 101, 255, 256, 257, 1000):
            yield Case("long-words", (unit * length)[:length])


def _special(tokens: Sequence[str]) -> Iterator[Case]:
    """Yield added tokens inside text: touching it, doubled, broken, in capitals."""
    for token in (*tokens[:60], *tokens[-4:]):
        for text in (
            token,
            f"{token}text",
            f"text{token}",
            f"text {token} text",
            f"  {token}  \n",
            token * 2,
            token[:-1],
            token[1:],
            f"é{token}語",
            token.upper(),
        ):
            yield Case("special-tokens", text)


def _vocabulary(texts: Sequence[str]) -> Iterator[Case]:
    """Yield single tokens' texts alone and between letters, where a merge may or may not be taken."""
    for text in texts:
        yield Case("vocabulary", text)
        yield Case("vocabulary", f"a{text}b")


def _sample_lines() -> Iterator[Case]:
    """Yield the shipped text: its sentences, its lines, and its documents whole."""
    for sentence in load_sentences():
        yield Case("sentences", sentence)
    for document in load_documents(None):
        yield Case("documents", document)
        for line in document.splitlines(keepends=True):
            yield Case("lines", line)


def _mixtures(special_tokens: Sequence[str], count: int) -> Iterator[Case]:
    """Yield pieces of everything joined without regard for sense."""
    rng = random.Random(_SEED)
    pieces = [text for texts in strings.BY_KIND.values() for text in texts if text]
    pieces += [*strings.SPACES, *strings.COMPOSED, *special_tokens[:20]]
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(2, 6)):
            piece = rng.choice(pieces)
            start = rng.randrange(len(piece))
            parts.append(piece[start : start + rng.randint(1, 12)])
        yield Case("mixtures", "".join(parts))


def _short(value: object, width: int = 80) -> str:
    """Return a value's text, cut for a message."""
    text = str(value)
    return text if len(text) <= width else text[: width - 3] + "..."


# The written samples: strings on which tokenizers are known to part. Data only, from here to the end.
