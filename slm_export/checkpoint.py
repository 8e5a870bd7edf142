"""A model as data: configuration, weights by name, and where its tokenizer is.

Frozen: a pass returns a new Checkpoint that shares what it did not touch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.weights import Weight

Role = Literal["embedding", "head", "table", "linear", "other"]
"""embedding: the vocabulary's table. head: the output layer over the vocabulary. table: any other
embedding (positions, segments). linear: a matrix that multiplies activations. other: norms, biases."""


@dataclass(frozen=True)
class Vocabulary:
    """What a pass left of the source's tokens, and the tokenizer that has those alone."""

    tokens: tuple[int, ...]
    """Row of the embedding -> the source's id of that token."""
    files: Mapping[str, bytes]
    """Name -> content, of every file that belongs in a bundle's ``tokenizer/``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", MappingProxyType(dict(self.files)))


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the parameter names of the transformers module, with what is known of them."""

    folder: Path
    name: str
    architecture: str
    """The transformers class: LlamaForCausalLM, BertModel, ..."""
    task: str
    """One of `tasks.ENDINGS`."""
    config: Any
    """The transformers configuration object; treated as read-only. A pass that removes layers changes a copy. Widths
    are those of the weights: layers may differ in heads and neurons, which no configuration can say."""
    weights: Mapping[str, Weight]
    roles: Mapping[str, Role]
    tied: Mapping[str, str] = field(default_factory=dict)
    """Parameter that has no weight of its own -> the one it shares: lm_head.weight -> the embedding."""
    positions: int | None = None
    """Tokens that the position embedding or the configuration has room for; None: without bound."""
    transposed: frozenset[str] = frozenset()
    """Weights that the module holds as (in, out); here they are (out, in), like all others."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the files that the module has no place for, and why."""
    vocabulary: Vocabulary | None = None
    """The tokens that are left, where a pass took some away; None: the source's, with the tokenizer of ``folder``."""
    history: tuple[str, ...] = ()
    """Names of the passes that made this checkpoint, in order."""

    def __post_init__(self) -> None:
        for name in ("weights", "roles", "tied", "unused"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def with_weights(self, changed: Mapping[str, Weight]) -> Checkpoint:
        """Return this checkpoint with some weights replaced; every name must be known."""
        assert changed.keys() <= self.weights.keys()
        return replace(self, weights={**self.weights, **changed})

    @property
    def parameters(self) -> int:
        """Number of values; a tied pair counts once."""
        return sum(weight.count for weight in self.weights.values())

    @property
    def bytes(self) -> int:
        """Size of the weights in storage; a tied pair counts once."""
        return sum(weight.bytes for weight in self.weights.values())


@dataclass(frozen=True)
class PassResult:
    """What a pass made. Every weight in its scope is changed, or skipped with a reason."""

    checkpoint: Checkpoint
    skipped: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What else a reader of the report should know: what was removed and what that was measured to cost."""


class Pass(Protocol):
    """One transformation of a checkpoint. Options are the fields of a frozen dataclass."""

    name: ClassVar[str]
    calibrated: ClassVar[bool]
    """Whether it measures activations, and needs text for that."""
    quantizes: ClassVar[bool]
    """Whether it puts matrices on the integer grid, and takes ``--bits`` and its kin."""
    structural: ClassVar[bool]
    """Whether it changes shapes: a distance between weights before and after means nothing then."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the options do not fit the model; reads no weight."""

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Return the transformed checkpoint, of one that ``check`` accepts; each weight made goes to its keeper."""
