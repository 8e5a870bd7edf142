"""The app's tokenizer against the source's, and the stop tokens in the file against the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.fidelity.vocabularies import FewerTokens
from slm_export.gates import Gates
from slm_export.results import Check
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.conformance import Case, cases, compare
from slm_export.tokenization.runtime_tokenizers import RuntimeTokenizer, TokenizerLoadError
from slm_export.tokenization.tokenizer import SourceTokenizer

_VOCABULARY_SAMPLE = 400

NO_TOKENIZER = (
    "tokenizer: the runtime has none; let the app tokenize with Hugging Face tokenizers and tokenizer.json"
)


@dataclass(frozen=True)
class TokenizerVerdict:
    """Checks that count, and notes on what does not reproduce but does not count."""

    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def judge_tokenizer(
    source: SourceTokenizer, open_runtime: Callable[[], RuntimeTokenizer | None], task: str, gates: Gates
) -> TokenizerVerdict:
    """Run thousands of strings through the runtime's tokenizer and the source's.

    Given   open_runtime: opens the tokenizer that the runner reads text with; returns None where there is none
    Below the threshold, what kinds of text part is said in a note.
    An encoder is fed token ids by the app, with whatever tokenizer the app has; the runtime's not reading
    the file is then worth a note, not a failure. A decoder runs in the vendor's own runner.
    """
    decodes = task == GENERATION
    try:
        runtime = open_runtime()
    except TokenizerLoadError as error:
        if decodes:
            return TokenizerVerdict((Check("tokenizer_agreement", False, str(error)),))
        reason = str(error).partition(": ")[2]
        return TokenizerVerdict(
            notes=(
                f"tokenizer: {reason}; let the app tokenize with Hugging Face tokenizers and tokenizer.json",
            )
        )
    if runtime is None:
        return TokenizerVerdict(notes=(NO_TOKENIZER,))
    strings = _strings(source)
    result = compare(
        source.encode, runtime.encode, source.decode, runtime.decode if decodes else None, strings
    )
    agreement = 1 - result.mismatches / result.total
    limit = gates.min_tokenizer_agreement if decodes else None
    passed = limit is None or agreement >= limit
    check = Check("tokenizer_agreement", passed, result.summary(), agreement, limit)
    notes = () if result.agreed else (f"tokenizer: {result.summary()}",)
    return TokenizerVerdict((check,), (*notes, *_transformers_parts(source, strings)))


def judge_tokenizer_file(source: SourceTokenizer, file: Path) -> Check:
    """Hold the tokenizer.json that apps are given against the source's own, both read by Hugging Face's tokenizers.

    A runtime that reads some text in its own way has a threshold. A file has none: every text must be the same.
    """
    from tokenizers import Tokenizer

    try:
        given = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception on a file that it cannot read
        return Check("tokenizer_file", False, f"{file.name} cannot be read: {error}")
    given.no_truncation()
    given.no_padding()
    result = compare(
        source.encode,
        lambda text: given.encode(text, add_special_tokens=False).ids,
        source.decode,
        # What transformers makes of ids, beside the file, is its own affair.
        None if source.published is None else lambda ids: given.decode(list(ids), skip_special_tokens=False),
        _strings(source),
    )
    return Check("tokenizer_file", result.agreed, result.summary(f"the bundle's {file.name}"))


def _strings(source: SourceTokenizer) -> tuple[Case, ...]:
    """Return what is known to be read in different ways, and some of the source's own tokens."""
    chat = source.render_chat("What is the capital of France?")
    return cases(source.added_tokens, (chat,) if chat else (), source.vocabulary_sample(_VOCABULARY_SAMPLE))


def judge_vocabulary(both: FewerTokens, documents: Sequence[str]) -> Check:
    """Hold a smaller vocabulary against the source's: the same tokens under other ids, and all text still readable."""
    source, artifact = both.source, both.artifact
    texts, ours = (
        {token: text for text, token in one.backend.get_vocab().items()} for one in (source, artifact)
    )
    moved = [new for new, old in enumerate(both.kept) if ours.get(new) != texts.get(old)]
    strings = (*(case.text for case in cases(source.added_tokens)), *documents)
    lost = [t for t in strings if source.decode(source.encode(t)) != artifact.decode(artifact.encode(t))]
    stops = sorted(both.kept[token] for token in artifact.stop_ids) == sorted(source.stop_ids)
    problems = []
    if len(ours) != len(both.kept) or moved:
        named = f", {ours.get(moved[0])!r} first" if moved else ""
        problems.append(f"{len(moved)} of {len(both.kept):,} tokens have the rows of others{named}")
    if lost:
        problems.append(
            f"{len(lost)} of {len(strings):,} texts do not read back as before, {lost[0][:60]!r} first"
        )
    if not stops:
        problems.append(
            f"generation stops at {list(artifact.stop_ids)}, which are other tokens than the source's"
        )
    detail = f"{len(both.kept):,} of {len(texts):,} tokens, and {len(strings):,} texts read back as before"
    return Check("vocabulary", not problems, "; ".join(problems) or detail)


def _transformers_parts(source: SourceTokenizer, strings: Sequence[Case]) -> tuple[str, ...]:
    """Say where transformers reads text otherwise than the file that it comes with."""
    result = compare(source.encode, source.encode_by_transformers, source.decode, None, strings)
    if result.agreed:
        return ()
    kinds = ", ".join(kind for kind, (wrong, _) in result.by_kind.items() if wrong)
    return (
        f"tokenizer: transformers reads {result.mismatches:,} of {result.total:,} strings otherwise than "
        f"tokenizer.json, which is what the app has and what this artifact was judged with: {kinds}",
    )


def judge_opening_token(in_file: int | None, tokenizer: SourceTokenizer) -> Check:
    """Compare the opening token that the file names with the tokenizer's.

    A file may name none where the tokenizer does not put one before a text by itself.
    """
    needed = tokenizer.bos_id if tokenizer.adds_bos or in_file is not None else None
    detail = f"the file opens a text with {in_file}" + (
        "" if in_file == needed else f", the tokenizer with {needed}"
    )
    return Check("opening_token", in_file == needed, detail)


def judge_stop_tokens(in_file: Sequence[int], stop_ids: tuple[int, ...]) -> Check:
    """Compare the stop tokens that the file names with those of ``generation_config.json``."""
    passed = sorted(in_file) == sorted(stop_ids)
    detail = f"the file stops at {list(in_file)}, the model at {list(stop_ids)}"
    if not stop_ids:
        return Check("stop_tokens", passed, "the model names no stop token: it never ends by itself")
    return Check("stop_tokens", passed, detail)
