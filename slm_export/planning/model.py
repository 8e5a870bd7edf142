"""A model as its configuration and the headers of its files tell it: shapes and roles, without torch or a value read.

What a tensor is for is told from its name and shape, where `source.load` builds the module and asks it; a test holds
the two against each other. GPT-2's transposed matrices keep the orientation of the file here, which moves their scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from slm_export.errors import InputError
from slm_export.planning.headers import FLOATS, read_config, read_tensors

Role = Literal["embedding", "head", "table", "linear"]
GENERATION = "text-generation"
_ENDINGS = (("ForCausalLM", GENERATION), ("WithLMHeadModel", "scores"), ("LMHeadModel", GENERATION))
_EMBEDS = "Model"
_OF_WORDS = ("ForMaskedLM", "WithLMHeadModel")
_LOOKED_UP = re.compile(
    r"(position|token_type|lang|segment)_embeddings?|wpe|embed_positions|position_embed\w*"
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "dim", "emb_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_INTERMEDIATE = ("intermediate_size", "n_inner", "hidden_dim")
_POSITIONS = ("max_position_embeddings", "n_positions")
_OTHERS = ("vocab_size", "head_dim", "num_key_value_heads")
_MOST = 1 << 40
_VOCABULARY = re.compile(r"emb|wte|embd", re.IGNORECASE)
_NUMBERED = re.compile(r"\.(\d+)\.")
# Parts of a file that a bare encoder has no place for.
_NOT_OF_AN_ENCODER = re.compile(
    r"(^|\.)(pooler|cls|lm_head|qa_outputs|classifier|pred_layer|seq_relationship)\."
)


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) under the name that the file gives it."""

    name: str
    shape: tuple[int, int]
    role: Role
    source_bytes: int
    """Of one value in the source's files."""

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """What a plan knows of a model."""

    folder: Path
    name: str
    architecture: str
    decodes: bool
    """Whether it writes text, with a KV cache."""
    matrices: tuple[Matrix, ...]
    vectors: int
    """Values of norms and biases."""
    others_bytes: int
    """Of what is neither matrix nor vector, as the source stores it."""
    tied: bool
    """Whether the head is the embedding."""
    layers: int
    """As they are computed; ALBERT stores one of them."""
    kv_values: int
    """Values that one token puts into the KV cache, over all layers; 0 without one."""
    kv_heads: int
    hidden: int
    intermediate: int
    """Neurons of a layer; 0 where the configuration does not say."""
    positions: int | None

    @property
    def parameters(self) -> int:
        """Number of values; a tied pair counts once."""
        return sum(matrix.count for matrix in self.matrices) + self.vectors

    @property
    def source_bytes(self) -> int:
        """Size of the matrices in the source's files."""
        return sum(matrix.count * matrix.source_bytes for matrix in self.matrices)

    @cached_property
    def largest_table(self) -> int:
        """Values of the largest matrix over the vocabulary; it is lowered as a whole."""
        return max((m.count for m in self.matrices if m.role in ("embedding", "head")), default=0)

    @property
    def head_width(self) -> int:
        """Values of a head whose positions are rotated; 0 where there is no cache, or a table of positions."""
        if not self.kv_values or any(matrix.role == "table" for matrix in self.matrices):
            return 0
        return self.kv_values // (2 * self.layers * self.kv_heads)

    @cached_property
    def widest(self) -> int:
        """Columns or rows of the widest linear layer."""
        return max((max(m.shape) for m in self.matrices if m.role == "linear"), default=0)

    @cached_property
    def repeats(self) -> float:
        """How often a stored layer is computed: more than once only where layers share their weights."""
        stored = {number for m in self.matrices if (number := number_of(m.name)) is not None}
        return self.layers / len(stored) if len(stored) == 1 else 1.0


def read_model(folder: Path) -> ModelShape:
    """Read ``config.json`` and the headers of the safetensors files.

    Raises:
        InputError: one of them is missing or broken.
    """
    config = read_config(folder / "config.json")
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    _refuse_odd_sizes(folder / "config.json", text)
    architecture = _architecture(folder / "config.json", config)
    decodes = any(architecture.endswith(ending) and task == GENERATION for ending, task in _ENDINGS)
    tensors = dict(read_tensors(folder))
    if architecture.endswith(_EMBEDS) and not decodes:
        tensors = {name: tensor for name, tensor in tensors.items() if not _NOT_OF_AN_ENCODER.search(name)}
    vocabulary = _first(text, "vocab_size") or 0
    matrices = [
        Matrix(name, (shape[0], shape[1]), _role(name, shape, vocabulary), FLOATS[dtype])
        for name, (shape, dtype) in tensors.items()
        if len(shape) == 2
    ]
    tied = _tied(text, matrices) if decodes or architecture.endswith(_OF_WORDS) else False
    layers, hidden = dimensions(text)
    groups, width = kv_heads(text)
    return ModelShape(
        folder=folder,
        name=folder.resolve().name,
        architecture=architecture,
        decodes=decodes,
        matrices=tuple(m for m in matrices if not (tied and m.role == "head")),
        vectors=sum(prod(shape) for shape, _ in tensors.values() if len(shape) == 1),
        others_bytes=sum(prod(s) * FLOATS[d] for s, d in tensors.values() if len(s) not in (1, 2)),
        tied=tied,
        layers=layers,
        kv_values=2 * layers * groups * width if decodes else 0,
        kv_heads=groups,
        hidden=hidden,
        intermediate=_first(text, *_INTERMEDIATE) or 0,
        positions=_first(text, *_POSITIONS),
    )


def _architecture(path: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            f"{path}: 'architectures' is missing; name the model's class, [\"LlamaForCausalLM\"]"
        )
    return names[0]


def _tied(config: Mapping[str, Any], matrices: Sequence[Matrix]) -> bool:
    """Return whether the head is the embedding: as the configuration says, or because the files hold no head."""
    return bool(config.get("tie_word_embeddings", all(matrix.role != "head" for matrix in matrices)))


def _refuse_odd_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError where a size is none; some families list one for each layer, which is left alone."""
    for name in (*_LAYERS, *_HIDDEN, *_HEADS, *_INTERMEDIATE, *_POSITIONS, *_OTHERS):
        value = config.get(name)
        whole = type(value) is int and 0 <= value < _MOST
        if not whole and value is not None and not isinstance(value, list):
            raise InputError(
                f"{path}: {name} is {json.dumps(value)}; it must be a whole number of a sane size"
            )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of some settings that is there: families name them differently."""
    found = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    return None if found is None else int(found)


def dimensions(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return layers and width of a configuration; 0 for what it does not say."""
    layers = _first(config, *_LAYERS) or 0
    return layers, _first(config, *_HIDDEN) or 0


def kv_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the key-value heads of a layer, and their width."""
    heads = _first(config, *_HEADS) or 0
    _, hidden = dimensions(config)
    width = _first(config, "head_dim") or (hidden // heads if heads else 0)
    return _first(config, "num_key_value_heads") or heads, width


def number_of(name: str) -> int | None:
    """Return the layer that a tensor is in; None outside."""
    found = _NUMBERED.search(name)
    return None if found is None else int(found[1])


def _role(name: str, shape: tuple[int, ...], vocabulary: int) -> Role:
    last = name.removesuffix(".weight").rpartition(".")[2]
    if shape[0] == vocabulary:
        return "embedding" if _VOCABULARY.search(last) and last != "embed_out" else "head"
    return "table" if _LOOKED_UP.fullmatch(last) else "linear"
