"""A teacher behind an OpenAI-compatible endpoint: a URL, a model's name, and a key that only the environment knows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from slm_export.errors import InputError, MachineError, MissingComponentError
from slm_export.learning.teaching import INSTRUCTION, Question, Solution

KEY_VARIABLE = "SLM_EXPORT_TEACHER_KEY"
RETRIES = 4
"""Of a request that fails for a reason that may pass: a lost connection, 408, 409, 429 and 5xx."""
_NO_KEY = "none"


def is_url(teacher: str) -> bool:
    """Whether a teacher is given by URL."""
    return "://" in teacher


class Endpoint:
    """A model that answers chats over HTTP; see `ReasoningTeacher`."""

    chunk = 1

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        temperature: float = 0.7,
        max_tokens: int = 1024,
        timeout_s: float = 120.0,
        at_once: int = 4,
        retries: int = RETRIES,
    ) -> None:
        """Open a client; nothing is sent but, where no model is named, the question which there are.

        Raises:
            InputError: the URL is none, or the endpoint has several models and none is named.
            MachineError: it cannot be reached.
            MissingComponentError: the client is not installed.
        """
        self._url = _checked(url)
        self._key = os.environ.get(KEY_VARIABLE, "").strip() or _NO_KEY
        self._client = _client(self._url, self._key, timeout_s, retries)
        self._timeout_s, self._temperature, self._max_tokens = timeout_s, temperature, max_tokens
        self.at_once = at_once
        self._model = model or self._only_model()
        self.identity: Mapping[str, object] = {
            "endpoint": self._url,
            "model": self._model,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "instruction": INSTRUCTION,
        }

    def solve(self, questions: Sequence[Question]) -> list[Solution]:
        """Return a solution for each question; see `ReasoningTeacher`."""
        return [self._solve(question) for question in questions]

    def _solve(self, question: Question) -> Solution:
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": question.problem},
        ]
        with self._told():
            made: Any = self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=self._temperature,
                max_tokens=self._max_tokens,
                seed=question.seed,
            )
        choices: Any = getattr(made, "choices", None)
        text = getattr(getattr(choices[0], "message", None), "content", None) if choices else None
        if not isinstance(text, str):
            raise InputError(
                f"{self._url}: the answer holds no text; is this the /v1 of an OpenAI-compatible API?"
            )
        return Solution(text, finished=choices[0].finish_reason != "length")

    def _only_model(self) -> str:
        with self._told():
            listed: Any = self._client.models.list()
            names = [str(model.id) for model in getattr(listed, "data", None) or ()]
        if len(names) == 1:
            return names[0]
        some = ", ".join(names[:8]) or "none that it tells"
        raise InputError(f"{self._url}: name the teacher with --teacher-model; this endpoint has {some}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what the client's errors mean, without the key."""
        import openai

        try:
            yield
        except openai.APITimeoutError:
            raise MachineError(
                f"{self._url}: no answer within {self._timeout_s:g} s; see that it runs, or give it longer with "
                f"--timeout. {_KEPT}"
            ) from None
        except openai.APIConnectionError as error:
            raise MachineError(
                f"{self._url}: cannot be reached ({self._clean(error.__cause__ or error)}); see that it runs and "
                f"that the URL is right. {_KEPT}"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            given = "no key was given" if self._key == _NO_KEY else "the key was refused"
            raise InputError(
                f"{self._url}: {given} (HTTP {error.status_code}); put the key into the environment variable "
                f"{KEY_VARIABLE}"
            ) from None
        except openai.RateLimitError as error:
            raise MachineError(
                f"{self._url}: too many requests, or the account is empty ({self._clean(error)}). {_KEPT}"
            ) from None
        except openai.APIStatusError as error:
            kind = MachineError if error.status_code >= 500 else InputError
            raise kind(f"{self._url}: refuses: {self._clean(error)}") from None
        except (openai.OpenAIError, AttributeError, ValueError) as error:
            # A page in the place of an answer: the client hands on whatever it is.
            raise InputError(
                f"{self._url}: does not answer as an OpenAI-compatible API does ({self._clean(error)})"
            ) from None

    def _clean(self, error: object) -> str:
        words = " ".join(str(error).split())[:300]
        return words if self._key == _NO_KEY else words.replace(self._key, "***")


_KEPT = "The answers so far are kept: type the same command again to go on"


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1
    except ValueError:
        bad, parts = True, None
    if bad or parts is None:
        raise InputError(f"{url}: not a URL of http or https, such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # It is recorded beside the model and shown in errors.
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise InputError(
            f"{place}: the URL of a teacher holds no key, query or fragment; a key goes into the environment variable "
            f"{KEY_VARIABLE}"
        )
    return url.rstrip("/")


def _client(url: str, key: str, timeout_s: float, retries: int) -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingComponentError(
            f"a teacher given by URL needs openai ({error}); pip install 'slm-export[learning]'"
        ) from error
    client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=retries)
    # Taken from the environment otherwise, and sent to whoever the URL names.
    client.organization = client.project = None
    return client
