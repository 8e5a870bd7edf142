"""The source model's own tokenizer, and a detokenizer for streams of tokens.

The oracle is tokenizer.json as its makers published it, read by the `tokenizers` library; transformers builds
some tokenizers anew (Llama's), and then parts from the file where a text begins with a space. Special tokens
and chats are transformers' matter, and so is a vocabulary without that file, or with tokens that are not in it.
Code that a checkpoint brings along is never executed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slm_export.errors import InputError, SlmExportError
from slm_export.tokenization.templates import render_chat
from slm_export.tokenization.tokenizer_checks import check_files, check_template, stop_ids_of

if TYPE_CHECKING:
    from slm_export.checkpoint import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The files of a checkpoint that belong in a bundle's ``tokenizer/`` folder, where they exist."""

OWN_TOKENIZER = "tokenizer/tokenizer.json"
"""The source's own tokenizer in a bundle."""


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of ``folder`` that belong in a bundle's ``tokenizer/`` folder."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


@dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer of a checkpoint folder, as transformers reads it."""

    folder: Path
    stop_ids: tuple[int, ...]
    """Where generation ends. As in transformers' ``generate``, ``eos_token_id`` of generation_config.json
    alone decides where it is set; otherwise the union of config.json's and the tokenizer's own."""
    backend: Any = field(repr=False)
    """The transformers tokenizer itself, for what this face does not cover."""
    published: Any = field(default=None, repr=False)
    """The `tokenizers` tokenizer of tokenizer.json, where it has all tokens that transformers knows."""
    made: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """The files of a tokenizer that a pass made, which lies in no folder yet; name -> content."""

    @classmethod
    def load(cls, folder: Path) -> SourceTokenizer:
        """Open the tokenizer of a folder, without network and without executing code from it."""
        check_files(folder)
        from transformers import AutoTokenizer

        with _told(folder, "cannot be loaded"):
            backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            published = _published(folder, backend)
        check_template(folder, backend.chat_template)
        return cls(folder, stop_ids_of(folder, backend.eos_token_id), backend, published)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it."""
        if self.published is None:
            return self.encode_by_transformers(text)
        with _told(self.folder, "fails"):
            ids: list[int] = self.published.encode(text, add_special_tokens=False).ids
        return ids

    def encode_by_transformers(self, text: str) -> list[int]:
        """Return what transformers makes of a text, nothing added before or after it."""
        return self._ids(text, special=False)

    def encode_with_template(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the tokenizer adds around it."""
        before, after = self.template
        return [*before, *self.encode(text), *after]

    @functools.cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """The ids that transformers adds before and after a text."""
        whole, inner = self._ids("a", special=True), self._ids("a", special=False)
        start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return whole[:start], whole[start + len(inner) :]

    def encode_pair(self, question: str, passage: str) -> tuple[list[int], list[int]]:
        """Return ids and token types of a question with a passage; no types where the tokenizer makes none."""
        encoded = self.backend(question, passage, truncation=False, verbose=False)
        return encoded["input_ids"], encoded.get("token_type_ids", [])

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # Windows are cut later: neither truncation nor a warning about the length is wanted here.
        with _told(self.folder, "fails"):
            encoded = self.backend(text, add_special_tokens=special, truncation=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        decoder = self.backend if self.published is None else self.published
        with _told(self.folder, "fails"):
            text: str = decoder.decode(list(ids), skip_special_tokens=False)
        return text

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; the model's embedding may have more rows."""
        return len(self.backend)

    @property
    def bos_id(self) -> int | None:
        """The opening token, if the tokenizer names one."""
        return self.backend.bos_token_id  # type: ignore[no-any-return]

    @property
    def pad_id(self) -> int:
        """The token that fills up behind a text; 0 where none is named, which a mask hides anyway."""
        return int(self.backend.pad_token_id or 0)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts the opening token before a text by itself."""
        return self.bos_id is not None and self.encode_with_template("a")[:1] == [self.bos_id]

    @property
    def chat_template(self) -> str | None:
        """The template's text (Jinja); the default one where there are several by name."""
        template = self.backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that stand for special tokens, by id."""
        return tuple(token.content for _, token in self._added() if token.special)

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Every text that is matched whole before tokenizing, special or not, by id."""
        return tuple(token.content for _, token in self._added())

    def _added(self) -> list[tuple[int, Any]]:
        return sorted(self.backend.added_tokens_decoder.items())

    def vocabulary_sample(self, count: int) -> tuple[str, ...]:
        """Return the texts of ``count`` tokens spread evenly over the vocabulary."""
        step = max(1, self.vocab_size // count)
        texts = (self.decode([token]) for token in range(0, self.vocab_size, step))
        return tuple(text for text in texts if text and "\ufffd" not in text)[:count]

    def render_chat(self, prompt: str, system: str | None = None) -> str | None:
        """Return the chat template around a prompt, up to the answer; None without a template."""
        if not self.backend.chat_template:
            return None
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        return render_chat(self.backend, messages, str(self.folder), answer=True)

    def files(self) -> dict[str, bytes]:
        """Return what belongs in a bundle's ``tokenizer/``, name -> content; a tokenizer.json in any case."""
        found = dict(self.made) or {file.name: file.read_bytes() for file in tokenizer_files(self.folder)}
        return (
            found if "tokenizer.json" in found else {**found, "tokenizer.json": self.tokenizer_json_bytes()}
        )

    def tokenizer_json_bytes(self) -> bytes:
        """Return the folder's tokenizer.json, or the one that transformers converted its vocabulary to."""
        if self.made:
            return self.made["tokenizer.json"]
        file = self.folder / "tokenizer.json"
        if file.is_file():
            return file.read_bytes()
        fast = getattr(self.backend, "backend_tokenizer", None)
        if fast is None:
            raise InputError(
                f"{self.folder}: no tokenizer.json, and {type(self.backend).__name__} has no fast tokenizer "
                "to make one of"
            )
        serialised: str = fast.to_str()
        return serialised.encode("utf-8")


def tokenizer_of(checkpoint: Checkpoint) -> SourceTokenizer:
    """Return the tokenizer that a checkpoint reads text with: its folder's, or what a pass left of that."""
    if checkpoint.vocabulary is None:
        return SourceTokenizer.load(checkpoint.folder)
    with TemporaryDirectory(prefix="slm-export-") as folder:
        for name, content in checkpoint.vocabulary.files.items():
            (Path(folder) / name).write_bytes(content)
        opened = SourceTokenizer.load(Path(folder))
    return replace(opened, folder=checkpoint.folder, made=checkpoint.vocabulary.files)


class Detokenizer:
    """Turns a stream of ids into a stream of text, never showing half a character.

    Decoding token by token is wrong twice: a character may span tokens, and some decoders drop the space
    before the first token they are given. So each id is decoded behind the piece shown before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes, perhaps none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        stable = text.rstrip("\ufffd")  # a replacement at the end may be the start of a character
        new = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(text):
            self._forget()
        return new

    def flush(self) -> str:
        """Return what is held back, as it is, and start anew."""
        rest = self._decode(self._ids)[self._shown :] if self._ids else ""
        self._ids, self._context, self._shown = [], 0, 0
        return rest

    def _forget(self) -> None:
        """Keep only the ids since the last whole character as the context of the next."""
        recent = self._ids[self._context :]
        text = self._decode(recent)
        if text and not text.startswith("\ufffd"):
            self._ids, self._shown = recent, len(text)
        self._context = len(self._ids)


def _published(folder: Path, backend: Any) -> Any:
    """Return the tokenizer of tokenizer.json; None without the file, or where transformers knows more tokens."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    made = Tokenizer.from_file(str(file))
    # Windows are cut later: a text is never to be shortened or filled up.
    made.no_truncation()
    made.no_padding()
    return made if made.get_vocab(with_added_tokens=True) == backend.get_vocab() else None


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Turn what `tokenizers` raises into an InputError: plain Exception, and panics, which are none."""
    try:
        yield
    except SlmExportError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{folder}: the tokenizer {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
