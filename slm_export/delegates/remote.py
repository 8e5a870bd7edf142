"""An endpoint's answer, through OpenAI's client: its time-outs, its retries with pauses between them."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from slm_export.delegates.config import Remote, Sampling
from slm_export.delegates.local import Answer
from slm_export.delegates.triggers import duration_s
from slm_export.errors import InputError, MachineError, MissingComponentError


def ask(remote: Remote, prompt: str, sampling: Sampling) -> Answer:
    """Return what an endpoint answers to a chat of one message.

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
            made = client.chat.completions.create(
                model=remote.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
            )
        except openai.APIConnectionError as error:  # time-outs are of this kind
            raise MachineError(f"{host} cannot be reached: {error}") from error
        except openai.APIStatusError as error:
            kind = MachineError if error.status_code >= 500 or error.status_code == 429 else InputError
            raise kind(f"{host} answers {error.status_code}: {error.message}") from error
        except openai.OpenAIError as error:
            raise MachineError(f"{host}: {error}") from error
    text = made.choices[0].message.content if made.choices else None
    if text is None:
        raise MachineError(f"{host} answers without a text")
    return Answer(text, host)


def key_of(remote: Remote) -> str | None:
    """Return the endpoint's key; InputError where its variable is not set."""
    if remote.token_env is None:
        return None
    if not (key := os.environ.get(remote.token_env, "").strip()):
        raise InputError(f"remote.token_env: no variable {remote.token_env} is set, or it is empty")
    return key
