"""How a problem is put to a model and how its solution follows: by its chat template, or plainly where it has none."""

from __future__ import annotations

from typing import Any

from slm_export.learning.texts import Chat
from slm_export.tokenization.templates import render_chat
from slm_export.tokenization.tokenizer import SourceTokenizer

_PLACE = "{problem}"
PLAIN = f"Problem: {_PLACE}\nSolution:\n"


def prompt_ids(
    tokenizer: SourceTokenizer, problem: str, instruction: str | None = None, plain: str = PLAIN
) -> list[int]:
    """Return the ids behind which an answer begins.

    Given   instruction: put before the problem in a chat; a model without a template was never taught to follow one
            plain: how the problem is written without a template
    """
    if tokenizer.chat_template is None:
        before, _ = tokenizer.template
        return [*before, *tokenizer.encode(plain.replace(_PLACE, problem))]
    text = _chat(tokenizer, _messages(problem, instruction), answer=True)
    return tokenizer.encode(text)


def completion_ids(tokenizer: SourceTokenizer, problem: str, solution: str) -> list[int]:
    """Return the ids of a solution behind `prompt_ids`, with the token that ends it."""
    text = solution
    if tokenizer.chat_template is not None:
        asked = _messages(problem, None)
        prompt = _chat(tokenizer, asked, answer=True)
        whole = _chat(tokenizer, [*asked, {"role": "assistant", "content": solution}], answer=False)
        if whole.startswith(prompt):
            text = whole[len(prompt) :]
    ids, stops = tokenizer.encode(text), tokenizer.stop_ids
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    if end is not None:
        return ids[: end + 1]
    return [*ids, stops[0]] if stops else ids


def whole_text(tokenizer: SourceTokenizer, problem: str, solution: str, plain: str = PLAIN) -> str:
    """Return a problem with its solution as the model reads them, as text."""
    if tokenizer.chat_template is None:
        return plain.replace(_PLACE, problem) + solution
    messages = [*_messages(problem, None), {"role": "assistant", "content": solution}]
    return _chat(tokenizer, messages, answer=False)


def text_of_messages(tokenizer: SourceTokenizer) -> Chat:
    """Return what makes the text of a chat: the model's template, or without one a message on each line."""

    def chat(messages: Any, where: str) -> str:
        if tokenizer.chat_template is None:
            return "\n".join(str(message["content"]) for message in messages)
        return render_chat(tokenizer.backend, messages, where, answer=False)

    return chat


def _messages(problem: str, instruction: str | None) -> list[dict[str, str]]:
    content = problem if instruction is None else f"{instruction}\n\n{problem}"
    return [{"role": "user", "content": content}]


def _chat(tokenizer: SourceTokenizer, messages: Any, *, answer: bool) -> str:
    return render_chat(tokenizer.backend, messages, str(tokenizer.folder), answer=answer)
