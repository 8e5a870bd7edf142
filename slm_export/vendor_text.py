"""Greedy text of the vendor's own generation loop, with the bundled tokenizer, as an app would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_export.child import call, serve
from slm_export.results import Check
from slm_export.runtime import AdapterExporter, DecoderSession, Exporter
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer

TOKENS = 48


def judge_vendor_text(
    exporter: Exporter,
    path: Path,
    runner_tokenizer: Path,
    tokenizer: SourceTokenizer,
    session: DecoderSession,
    prompt: str,
    adapter: Path | None = None,
) -> Check:
    """Compare what the vendor's runner writes with what our session writes, both greedy, on one prompt.

    Given   adapter: a file that the runner is to turn on, and that is on in the session
    """
    prompt, prompt_ids = _fitting(prompt, tokenizer, session.context // 2)
    count = min(TOKENS, session.context - len(prompt_ids) - 1)
    tokens = _greedy(session, prompt_ids, tokenizer.stop_ids, count)
    runtime = exporter.open_tokenizer(path, runner_tokenizer, GENERATION)
    assert runtime is not None, "a decoder's runner reads text"
    expected = runtime.decode(tokens)
    request = {
        "path": str(path),
        "format": exporter.name,
        "tokenizer": str(runner_tokenizer),
        "prompt": prompt,
        "tokens": count,
        "bos": int(tokenizer.adds_bos),
        "adapter": None if adapter is None else str(adapter),
    }
    text = call("slm_export.vendor_text", request, f"run {path.name} in the vendor's runner")
    if text.startswith(expected) and len(tokens) < count:
        text = expected  # what follows is the stop token, which the runner prints too
    detail = "the vendor's runner and the bundled tokenizer give the text of this session"
    if text != expected:
        detail = (
            f"after {prompt!r} the vendor's runner writes {text[:160]!r}, this session {expected[:160]!r}"
        )
    return Check("runner_text", text == expected, detail)


def _fitting(prompt: str, tokenizer: SourceTokenizer, most: int) -> tuple[str, list[int]]:
    """Return the prompt and its tokens, at most ``most`` of them, words left out at its end if need be."""
    ids = tokenizer.encode_with_template(prompt)
    while len(ids) > most and " " in prompt:
        prompt = prompt.rpartition(" ")[0]
        ids = tokenizer.encode_with_template(prompt)
    return prompt, ids


def _greedy(session: DecoderSession, prompt: list[int], stop_ids: tuple[int, ...], count: int) -> list[int]:
    tokens: list[int] = []
    logits = session.logits(prompt, 0)
    while len(tokens) < count and (token := int(logits.argmax())) not in stop_ids:
        tokens.append(token)
        logits = session.logits([token], len(prompt) + len(tokens) - 1)
    return tokens


def _generate(request: dict[str, Any]) -> str:
    from slm_export.registry import exporter

    made = exporter(request["format"])
    given = (
        Path(request["path"]),
        Path(request["tokenizer"]),
        request["prompt"],
        request["tokens"],
        request["bos"],
    )
    if request["adapter"] is None:
        return made.generate(*given)
    assert isinstance(made, AdapterExporter)
    return made.generate_adapted(*given, Path(request["adapter"]))


if __name__ == "__main__":
    serve(_generate)
