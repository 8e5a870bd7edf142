"""The torch models that artifacts are compared with.

What they say of a text is the same for every format, so where there are several it is kept on disk: reading held-out
text is the longest part of a verification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.steps import StepErrors
from slm_export.fidelity.vocabularies import OneVocabulary, Vocabularies, fewer_tokens
from slm_export.graph.dialect import Rounding
from slm_export.graph.model import build_reference
from slm_export.machine import machine_errors
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of


@contextmanager
def references(
    source: Checkpoint, quantized: Checkpoint, steps: StepErrors | None, formats: int
) -> Iterator[References]:
    """Yield the models that so many formats are compared with; what they say is kept if there are several."""
    if formats < 2:
        yield References(source, quantized, steps)
        return
    with TemporaryDirectory(prefix="slm-export-") as folder:
        yield References(source, quantized, steps, Path(folder))


class References:
    """The source model, and the quantized one with and without a runtime's rounding of activations."""

    def __init__(
        self,
        source: Checkpoint,
        quantized: Checkpoint,
        steps: StepErrors | None = None,
        folder: Path | None = None,
    ) -> None:
        """``steps``: what the passes did; ``folder``: where outputs are kept for the next artifact; None: nowhere."""
        self.source, self.quantized, self.steps = source, quantized, steps
        self._folder = folder

    @functools.cached_property
    def source_model(self) -> nn.Module:
        """The model as it came; weights are read as they are used."""
        return build_reference(self.source)

    @functools.cached_property
    def quantized_model(self) -> nn.Module:
        """The weights of the artifacts, activations in float32."""
        return build_reference(self.quantized)

    def lowered_model(self, rounding: Rounding) -> nn.Module:
        """Return the weights of an artifact with its runtime's rounding of activations."""
        return build_reference(self.quantized, rounding)

    def vocabularies(self, tokenizer: SourceTokenizer) -> Vocabularies:
        """Return the tokens of source and artifact; ``tokenizer`` is the artifact's."""
        if self.quantized.vocabulary is None:
            return OneVocabulary(tokenizer)
        rows = int(self.source.config.get_text_config().vocab_size)
        return fewer_tokens(tokenizer_of(self.source), tokenizer, self.quantized.vocabulary.tokens, rows)

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return a float32 tensor by its name, computed once."""
        if self._folder is None:
            return compute()
        file = self._folder / f"{name}.npy"
        if not file.exists():
            with machine_errors("keep what the source model says", file):
                np.save(file, compute().numpy())
        return torch.from_numpy(np.load(file, mmap_mode="c"))
