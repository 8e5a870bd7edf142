"""LiteRT-LM itself: Google's runner of ``.litertlm`` files, as an app has it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slm_export.tokenization.runtime_tokenizers import TokenizerLoadError, captured_stderr


class LiteRTLMTokenizer:
    """The tokenizer in a ``.litertlm``, as LiteRT-LM reads it; closes with the object."""

    name = "LiteRT-LM"

    def __init__(self, path: Path) -> None:
        """Open the file, or raise ``TokenizerLoadError``."""
        self._opening = _engine(path)
        self._engine: Any = self._opening.__enter__()

    def __del__(self) -> None:
        """Let go of the file."""
        self._opening.__exit__(None, None, None)

    @property
    def bos_id(self) -> int | None:
        """The opening token that the file names."""
        found: int | None = self._engine.bos_token_id
        return found

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens that the file names."""
        return tuple(ids[0] for ids in self._engine.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it."""
        ids: list[int] = self._engine.tokenize(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that an app shows for these ids."""
        text: str = self._engine.detokenize(list(ids))
        return text


def generate(path: Path, prompt: str, tokens: int) -> str:
    """Return ``tokens`` greedy tokens as text; opening token and stop tokens are those of the file."""
    litert_lm = importlib.import_module("litert_lm")
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with (
        _engine(path) as engine,
        engine.create_session(
            apply_prompt_template=False, sampler_config=greedy, max_output_tokens=tokens
        ) as session,
    ):
        session.run_prefill([prompt])
        return "".join(session.run_decode().texts)


@contextmanager
def _engine(path: Path) -> Iterator[Any]:
    litert_lm = importlib.import_module("litert_lm")
    log: list[str] = []
    # The runner keeps packed weights beside the model, which is no place of ours.
    with TemporaryDirectory(prefix="slm-export-") as cache:
        try:
            with captured_stderr(log):
                engine = litert_lm.Engine(str(path), cache_dir=cache)
        except (RuntimeError, ValueError) as error:
            raise TokenizerLoadError(
                f"{path}: LiteRT-LM cannot open it: {error}; {' '.join(log[-2:])}"
            ) from error
        with engine:
            yield engine
