"""The tokenizers that phones run, behind one small protocol.

An app does not tokenize with transformers: ExecuTorch's runner (and Android's ``LlmModule``) has a C++
reimplementation that reads the same ``tokenizer.json``. What it makes of a text decides what the model
sees, so it is opened here exactly as the runtime opens it.

What that C++ tokenizer does that its Python face does not tell:

- it logs to the file descriptor of stderr, with no switch to turn that off;
- a file it cannot read raises a bare "Failed to load HF tokenizer"; the reason is in that log;
- ``encode``'s ``bos`` and ``eos`` only turn the file's own template on: a ``tokenizer.json`` without one
  gets no opening token, whatever is asked for;
- it guesses its opening and stop tokens from their names unless it is given a folder that also holds
  ``tokenizer_config.json``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from slm_export.errors import GateError, InputError, MissingComponentError


class RuntimeTokenizer(Protocol):
    """A tokenizer as the app has it."""

    @property
    def name(self) -> str:
        """Whose tokenizer it is, for messages."""

    @property
    def bos_id(self) -> int | None:
        """The opening token, if the runtime names one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens that the runtime knows by itself."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that an app shows for these ids."""


class TokenizerLoadError(GateError):
    """The runtime cannot open this tokenizer, so no app built on that runtime can use the model's text."""


class ExecuTorchTokenizer:
    """ExecuTorch's own tokenizer, from a ``tokenizer.json`` or the folder that holds it.

    A folder is what to give: from a lone file the runtime guesses its opening and stop tokens.
    """

    name = "ExecuTorch"

    def __init__(self, path: Path) -> None:
        """Open the tokenizer, or raise ``TokenizerLoadError`` with the runtime's own words."""
        try:
            from pytorch_tokenizers import CppHFTokenizer
        except ImportError as error:
            raise MissingComponentError(
                f"ExecuTorch's tokenizer cannot be imported ({error}); pip install 'slm-export[executorch]'"
            ) from error
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: no such file; ExecuTorch's tokenizer needs a tokenizer.json")
        log: list[str] = []
        self._cpp: Any = CppHFTokenizer()
        self._pieces: dict[int, bytes] = {}
        try:
            with captured_stderr(log):
                self._cpp.load(str(path))
        except (RuntimeError, UnicodeError, MemoryError) as error:
            raise TokenizerLoadError(
                f"{file}: ExecuTorch's tokenizer cannot load it: {_reason(log) or error}"
            ) from error

    @property
    def vocab_size(self) -> int:
        """How many ids it knows."""
        return int(self._cpp.vocab_size())

    @property
    def bos_id(self) -> int | None:
        """The opening token, as the runtime read or guessed it."""
        return int(self._cpp.bos_tok())

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The one stop token, as the runtime read or guessed it."""
        return (int(self._cpp.eos_tok()),)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it.

        A failure that the runtime only logs, returning no ids, is raised: an app would lose the text.
        """
        log: list[str] = []
        try:
            with captured_stderr(log):
                ids: list[int] = self._cpp.encode(text, 0, 0)
        except RuntimeError as error:
            raise ValueError(_reason(log) or str(error)) from error
        if text and not ids and (reason := _reason(log)):
            raise ValueError(reason)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return what an app shows: the runner decodes token by token and joins the bytes.

        That is less than the runtime's own decoding of a whole list gives: with a SentencePiece-like
        decoder each piece loses its leading space, and a lone byte token is refused.
        """
        return b"".join(self._piece(token) for token in ids).decode("utf-8", errors="replace")

    def _piece(self, token: int) -> bytes:
        """Return the bytes of one token, kept: the runtime gives the same piece wherever the token stands."""
        piece = self._pieces.get(token)
        if piece is None:
            log: list[str] = []
            try:
                with captured_stderr(log):
                    piece = self._cpp.decode(token).encode("utf-8")
            except UnicodeDecodeError as error:
                piece = error.object  # part of a character: the bytes are right, only not text yet
            except RuntimeError as error:
                raise ValueError(_reason(log) or str(error)) from error
            self._pieces[token] = piece
        return piece


@contextlib.contextmanager
def captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what native code writes to stderr, instead of showing it.

    The redirection is of the whole process, so what other threads write meanwhile is collected too. A
    temporary file takes it: a pipe would block a talkative library.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # a daemon may have closed stderr: then there is nothing to keep quiet
        yield
        return
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            sink.seek(0)
            lines.extend(sink.read().decode("utf-8", errors="replace").splitlines())


def _reason(log: Sequence[str]) -> str:
    """Return the runtime's last complaint without its ``E tokenizers:file.cpp:12] `` prefix."""
    lines = [line for line in log if line.strip()]
    errors = [line for line in lines if line.startswith(("E ", "F "))] or lines
    return errors[-1].partition("] ")[2] or errors[-1] if errors else ""
