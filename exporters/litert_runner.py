"""LiteRT-LM itself: Google's runner of ``.litertlm`` files, as an app has it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slm_export.child import Child, serve_all
from slm_export.errors import GateError, MachineError
from slm_export.tokenization.runtime_tokenizers import TokenizerLoadError, captured_stderr

_TIMEOUT_S = 600.0
"""Of one request; the first loads the model."""


class LiteRTLMTokenizer:
    """The tokenizer in a ``.litertlm``, as LiteRT-LM reads it; closes with the object.

    It lives in a process of its own: a tokenizer.json that it does not expect ends the process that reads it.
    """

    name = "LiteRT-LM"

    def __init__(self, path: Path) -> None:
        """Open the file, or raise ``TokenizerLoadError``."""
        if importlib.util.find_spec("litert_lm") is None:  # the child could only die of it
            raise ImportError("No module named 'litert_lm'", name="litert_lm")
        self._opened = ExitStack()
        # The child's, but removed here however that ends.
        cache = self._opened.enter_context(TemporaryDirectory(prefix="slm-export-"))
        child = Child("slm_export.exporters.litert_runner", "read text with LiteRT-LM", _TIMEOUT_S)
        self._child = self._opened.enter_context(child)
        try:
            self._known = self._child.ask({"open": [str(path), cache]})
        except GateError as error:
            raise TokenizerLoadError(str(error)) from error
        except MachineError as error:
            raise TokenizerLoadError(f"{path}: LiteRT-LM cannot open it: {error}") from error

    def __del__(self) -> None:
        """Let go of the file."""
        self._opened.close()

    @property
    def bos_id(self) -> int | None:
        """The opening token that the file names."""
        found: int | None = self._known["bos_id"]
        return found

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens that the file names."""
        return tuple(self._known["eos_ids"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it; ValueError where the runtime fails."""
        ids: list[int] = self._asked({"encode": text})
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that an app shows for these ids; ValueError where the runtime fails."""
        text: str = self._asked({"decode": list(ids)})
        return text

    def _asked(self, request: dict[str, Any]) -> Any:
        try:
            answer = self._child.ask(request)
        except MachineError as error:
            raise ValueError(str(error)) from error
        if "failed" in answer:
            raise ValueError(answer["failed"])
        return answer["made"]


class _Served:
    """LiteRT-LM in the child: opened by the first request, asked by the others."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened
        self._engine: Any = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        if "open" in request:
            path, cache = request["open"]
            self._engine = self._opened.enter_context(_engine(Path(path), cache))
            stops = [int(ids[0]) for ids in self._engine.eos_token_ids]
            return {"bos_id": self._engine.bos_token_id, "eos_ids": stops}
        try:
            if "encode" in request:
                return {"made": list(self._engine.tokenize(request["encode"]))}
            return {"made": self._engine.detokenize(request["decode"])}
        except (RuntimeError, ValueError) as error:
            return {"failed": str(error)}


def generate(path: Path, prompt: str, tokens: int) -> str:
    """Return ``tokens`` greedy tokens as text; opening token and stop tokens are those of the file."""
    litert_lm = importlib.import_module("litert_lm")
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with (
        # The runner keeps packed weights beside the model, which is no place of ours.
        TemporaryDirectory(prefix="slm-export-") as cache,
        _engine(path, cache) as engine,
        engine.create_session(
            apply_prompt_template=False, sampler_config=greedy, max_output_tokens=tokens
        ) as session,
    ):
        session.run_prefill([prompt])
        return "".join(session.run_decode().texts)


@contextmanager
def _engine(path: Path, cache: str) -> Iterator[Any]:
    litert_lm = importlib.import_module("litert_lm")
    log: list[str] = []
    try:
        with captured_stderr(log):
            engine = litert_lm.Engine(str(path), cache_dir=cache)
    except (RuntimeError, ValueError) as error:
        raise TokenizerLoadError(
            f"{path}: LiteRT-LM cannot open it: {error}; {' '.join(log[-2:])}"
        ) from error
    with engine:
        yield engine


if __name__ == "__main__":
    with ExitStack() as stack:
        serve_all(_Served(stack))
