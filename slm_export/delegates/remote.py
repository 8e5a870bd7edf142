"""An endpoint's answer, through OpenAI's client: its time-outs, its retries with pauses between them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slm_export.delegates.config import Remote, Sampling
from slm_export.delegates.local import Answer, Show
from slm_export.delegates.triggers import duration_s
from slm_export.errors import InputError, MachineError, MissingComponentError

if TYPE_CHECKING:
    from openai import OpenAI


def ask(remote: Remote, prompt: str, sampling: Sampling, show: Show = lambda _: None) -> Answer:
    """Return what an endpoint answers to a chat of one message; a streamed answer is shown piece by piece.

    The time-out is one of the whole answer, and of each piece of a streamed one.

    Raises:
        MissingComponentError: the client is not installed.
        InputError: its key is not set, or the endpoint refuses the request.
        MachineError: it cannot be reached, or fails, after all retries.
    """
    try:
        import openai
    except ImportError as error:
        raise MissingComponentError(
            f"remote delegates need openai ({error}); pip install 'slm-export[delegates]'"
        ) from error
    host = urlsplit(remote.url).netloc
    with openai.OpenAI(
        base_url=remote.url,
        api_key=key_of(remote) or "none",
        timeout=duration_s(remote.timeout),
        max_retries=remote.retries,
    ) as client:
        try:
            text = (_streamed if sampling.stream else _whole)(client, remote.model, prompt, sampling, show)
        except openai.APIConnectionError as error:  # time-outs are of this kind
            raise MachineError(f"{host} cannot be reached: {error}") from error
        except openai.APIStatusError as error:
            kind = MachineError if error.status_code >= 500 or error.status_code == 429 else InputError
            raise kind(f"{host} answers {error.status_code}: {error.message}") from error
        except openai.OpenAIError as error:
            raise MachineError(f"{host}: {error}") from error
    if text is None:
        raise MachineError(f"{host} answers without a text")
    return Answer(text, host)


def _whole(client: OpenAI, model: str, prompt: str, sampling: Sampling, show: Show) -> str | None:
    made = client.chat.completions.create(**_request(model, prompt, sampling))
    text: str | None = made.choices[0].message.content if made.choices else None
    show(text or "")
    return text


def _streamed(client: OpenAI, model: str, prompt: str, sampling: Sampling, show: Show) -> str | None:
    pieces: list[str] = []
    ended = False
    with client.chat.completions.create(**_request(model, prompt, sampling), stream=True) as chunks:
        for chunk in chunks:
            for choice in chunk.choices[:1]:
                ended = ended or choice.finish_reason is not None
                if choice.delta.content:
                    show(choice.delta.content)
                    pieces.append(choice.delta.content)
    if not ended:
        raise MachineError("the endpoint broke off in the midst of an answer")
    return "".join(pieces)


def _request(model: str, prompt: str, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }


def key_of(remote: Remote) -> str | None:
    """Return the endpoint's key; InputError where its variable is not set."""
    if remote.token_env is None:
        return None
    if not (key := os.environ.get(remote.token_env, "").strip()):
        raise InputError(f"remote.token_env: no variable {remote.token_env} is set, or it is empty")
    return key
