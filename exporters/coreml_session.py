"""An ``.mlpackage`` open in the evaluator of saved programs: what Core ML itself is where there is no Mac."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from slm_export.bundles.checksums import size_of
from slm_export.errors import InputError
from slm_export.exporters import coreml_metadata as keys
from slm_export.exporters.coreml_graph import DECODE, IDS, LOGITS, MASK, PREFILL
from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Feature, Package
from slm_export.runtime import Session
from slm_export.source.tasks import GENERATION

_MUCH = 1 << 27


def open_session(path: Path, task: str) -> Session:
    """Open a package; InputError where it is not one of ours."""
    package = Package.open(path)
    for key in (keys.TASK, keys.CONTEXT):
        if key not in package.metadata:
            raise InputError(f"{path}: its metadata lacks '{key}'; export the model again")
    return Decoder(package) if task == GENERATION else Encoder(package)


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """Use one thread for little work: waiting for each other at every operator would cost more than it saves.

    Given   work: bytes of the package, times tokens
    """
    threads = torch.get_num_threads()
    if work >= _MUCH or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Decoder:
    """A decoder's two functions over one state.

    Given   hidden: what the mask adds to the scores of later tokens, where its width is not fixed
    """

    def __init__(self, package: Package, hidden: float = float("-inf")) -> None:
        self._package = package
        self._functions = {name: Evaluator(package, name) for name in package.functions}
        self._state = self._functions[PREFILL].make_state()
        self._bytes = size_of(package.path)
        features = {feature.name: feature for feature in package.functions[PREFILL].inputs}
        self._dtype = features[MASK].dtype
        self._width = _fixed_width(features[MASK])
        # A mask of fixed width also says where the tokens stand.
        self._hidden = hidden if self._width is None else float("-inf")
        self._lengths = _lengths(features[IDS])
        metadata = package.metadata
        self.context = int(metadata[keys.CONTEXT])
        self.prefill_chunk = int(metadata[keys.PREFILL])
        self.stop_ids = tuple(json.loads(metadata[keys.STOP_IDS]))
        self.bos_id = int(metadata[keys.BOS_ID]) if keys.BOS_ID in metadata else None
        self.vocabulary: int | None = None

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens at position ``start``; return float32 (vocabulary,) after the last of them."""
        if not tokens or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at {start} do not fit a context of {self.context}")
        logits, at = torch.empty(0), 0
        while at < len(tokens):
            count = self._count(len(tokens) - at)
            logits = self._call(tokens[at : at + count], start + at)
            at += count
        return logits[0, -1].float()

    def metadata(self) -> Mapping[str, str]:
        """Return the package's metadata."""
        return self._package.metadata

    def close(self) -> None:
        """Let go of the file and of its memory."""
        self._functions.clear()
        self._state.clear()

    def _count(self, left: int) -> int:
        """Return how many of the tokens that are left the next call takes."""
        if self._lengths is None:
            return min(left, self.prefill_chunk)
        return max((length for length in self._lengths if length <= left), default=1)

    def _call(self, tokens: Sequence[int], start: int) -> Tensor:
        count, end = len(tokens), start + len(tokens)
        rows = torch.arange(start, end).unsqueeze(1)
        columns = torch.arange(self._width or end)
        mask = torch.where(columns <= rows, 0.0, self._hidden).to(self._dtype)
        inputs = {IDS: torch.tensor([tokens], dtype=torch.int32), MASK: mask[None, None]}
        function = self._functions[DECODE if count == 1 else PREFILL]
        with _threads_for(count * self._bytes):
            return function.predict(inputs, self._state)[LOGITS]


def _fixed_width(mask: Feature) -> int | None:
    """Return the columns that a mask always has; None where it ends with the last token."""
    if mask.ranges is not None and mask.ranges[3][0] != mask.ranges[3][1]:
        return None
    return mask.shape[3]


def _lengths(ids: Feature) -> tuple[int, ...] | None:
    """Return the numbers of tokens that a function takes; None for any."""
    if ids.enumerated:
        return tuple(shape[1] for shape in ids.enumerated)
    return None if ids.ranges is not None else (ids.shape[1],)


class Encoder:
    """An encoder; what is shorter than one of its lengths is padded to the next."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._function = Evaluator(package)
        self._inputs = [feature.name for feature in package.functions[package.default].inputs]
        self._lengths: list[int] = sorted(json.loads(package.metadata[keys.LENGTHS]))
        self.context = int(package.metadata[keys.CONTEXT])

    @property
    def takes_token_types(self) -> bool:
        """Whether question and passage are told apart."""
        return "token_type_ids" in self._inputs

    def outputs(self, tokens: Sequence[int], mask: Sequence[int], types: Sequence[int] = ()) -> Tensor:
        """Return float32: an embedding (width,), or scores of the shape of the task, without batch."""
        if not tokens or len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a longest input of {self.context}")
        length = next(length for length in self._lengths if length >= len(tokens))
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types or [0] * len(tokens)}
        inputs = {
            name: torch.tensor([[*given[name], *[0] * (length - len(tokens))]], dtype=torch.int32)
            for name in self._inputs
        }
        (result,) = self._function.predict(inputs).values()
        return result[0].float()

    def metadata(self) -> Mapping[str, str]:
        """Return the package's metadata."""
        return self._package.metadata

    def close(self) -> None:
        """Nothing is held but mapped files."""
