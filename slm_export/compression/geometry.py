"""The parts of a layer that can be taken out: neurons of an MLP, and key-value heads with the queries that read them.

A part is rows of the matrices that make it, and columns of the one matrix that takes it back into the model:

    mlps        neurons: rows of gate and up (or of one matrix that holds both), columns of down
    attentions  key-value groups: a key head, its value head, all query heads that read them; columns of the output

They are found by the names that families give their matrices, in the two tables below, which is all that is known of
families. What is not in them is refused by name. Widths are those of the weights, so a pruned model is read like any.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.source.load import architecture_of


@dataclass(frozen=True)
class Parts:
    """Parts of one module of one layer, all of one kind."""

    path: str
    """Of the module, in the names of the checkpoint: model.layers.3.mlp"""
    rows: Mapping[str, Tensor]
    """Matrix -> its rows of each part, int64 (parts, rows); the vectors beside it (biases) have the same."""
    out: str
    """The matrix that takes the parts back."""
    columns: Tensor
    """Its columns of each part, int64 (parts, columns)."""

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.columns.shape[0]

    def parameters(self, checkpoint: Checkpoint) -> int:
        """Return how many values one part has in the matrices."""
        made = sum(
            rows.shape[1] * checkpoint.weights[f"{name}.weight"].shape[1] for name, rows in self.rows.items()
        )
        return made + self.columns.shape[1] * checkpoint.weights[f"{self.out}.weight"].shape[0]


@dataclass(frozen=True)
class _Mlp:
    into: tuple[str, ...]
    out: str
    fused: int = 1
    """Matrices that one matrix holds, one above the other."""
    alone: bool = True
    """Whether the module that has them has nothing else."""

    @property
    def names(self) -> tuple[str, ...]:
        """All its matrices."""
        return (*self.into, self.out)


@dataclass(frozen=True)
class _Attention:
    into: tuple[str, ...]
    """Query, key and value; or the one matrix that holds them in this order."""
    out: str
    owner: str = ""
    """The module that attends, if it is not the one that holds all."""
    beside: tuple[str, ...] = ()
    """What else is in there and is not touched."""

    @property
    def names(self) -> tuple[str, ...]:
        """All its matrices."""
        return (*self.into, self.out)


@dataclass(frozen=True)
class _Heads:
    queries: int
    groups: int
    """Key-value heads."""
    width: int

    def attributes(self) -> dict[str, int]:
        """Return what modules call their numbers of heads."""
        return {
            "num_heads": self.queries,
            "n_heads": self.queries,
            "num_attention_heads": self.queries,
            "num_key_value_heads": self.groups,
            "split_size": self.queries * self.width,
            "all_head_size": self.queries * self.width,
        }

    def put_into(self, config: Any) -> Any:
        """Return a configuration that says so."""
        if (config.num_attention_heads, config.num_key_value_heads) == (self.queries, self.groups):
            return config
        made = copy.copy(config)
        made.num_attention_heads, made.num_key_value_heads = self.queries, self.groups
        return made


_Kind = TypeVar("_Kind", _Mlp, _Attention)


_MLPS = (
    _Mlp(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Gemma, Qwen, SmolLM, OLMo
    _Mlp(("gate_up_proj",), "down_proj", fused=2),  # Phi-3
    _Mlp(("fc1",), "fc2"),  # Phi
    _Mlp(("c_fc",), "c_proj"),  # GPT-2
    _Mlp(("lin1",), "lin2"),  # DistilBERT, FlauBERT
    _Mlp(("ffn",), "ffn_output", alone=False),  # ALBERT
    _Mlp(("intermediate.dense",), "output.dense", alone=False),  # BERT, RoBERTa, MobileBERT
)
_ATTENTIONS = (
    _Attention(("q_proj", "k_proj", "v_proj"), "o_proj"),
    _Attention(("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
    _Attention(("qkv_proj",), "o_proj"),  # Phi-3
    _Attention(("c_attn",), "c_proj"),  # GPT-2
    _Attention(("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT, FlauBERT
    _Attention(("query", "key", "value"), "dense", beside=("LayerNorm",)),  # ALBERT
    _Attention(
        ("self.query", "self.key", "self.value"), "output.dense", "self", ("output.LayerNorm",)
    ),  # BERT, RoBERTa, MobileBERT
)
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_WIDTHS = ("head_dim", "attention_head_size")


def mlps(checkpoint: Checkpoint, asking: str) -> tuple[Parts, ...]:
    """Return the neurons of every MLP; reads no weight.

    Given   asking: the name of the pass, for the error

    Raises:
        InputError: the family has none of a known kind, or more in them than is known.
    """
    found = []
    for path, kind in _found(checkpoint, _MLPS):
        into = [f"{path}.{name}" for name in kind.into]
        width = _shape(checkpoint, into[0])[0] // kind.fused
        if kind.alone:
            _refuse_unknown(checkpoint, path, kind.names, asking)
        rows = torch.arange(width * kind.fused).view(kind.fused, width).t()
        columns = torch.arange(width).unsqueeze(1)
        found.append(Parts(path, dict.fromkeys(into, rows), f"{path}.{kind.out}", columns))
    return _some(found, checkpoint, "MLP", asking)


def attentions(checkpoint: Checkpoint, asking: str) -> tuple[Parts, ...]:
    """Return the key-value groups of every attention; reads no weight. Given and raised as by `mlps`."""
    module = architecture_of(checkpoint).empty_module()
    found = []
    for path, kind in _found(checkpoint, _ATTENTIONS):
        heads = _heads(checkpoint, module, path, kind)
        if heads is None:
            raise InputError(f"{asking}: {path} does not say how wide its heads are; leave the pass out")
        _refuse_wide_norms(checkpoint, path, heads.width, asking)
        _refuse_unknown(checkpoint, path, (*kind.names, *_HEAD_NORMS, *kind.beside), asking)
        found.append(_groups(path, kind, heads))
    return _some(found, checkpoint, "attention", asking)


def fit(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Tell attention layers how many heads their weights have, where that is not what the configuration says.

    Most families see it in the activations; some (Phi-3, GPT-2, FlauBERT) look it up.
    """
    configs: dict[_Heads, Any] = {}
    for path, kind in _found(checkpoint, _ATTENTIONS):
        owner: Any = module.get_submodule(_joined(path, kind.owner))
        heads = _heads(checkpoint, module, path, kind)
        if heads is None:
            continue
        for name, value in heads.attributes().items():
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, value)
        if "qkv_proj" in kind.into:  # Phi-3 reads the configuration at every call
            owner.config = configs.setdefault(heads, heads.put_into(owner.config))


def _found(checkpoint: Checkpoint, kinds: Sequence[_Kind]) -> list[tuple[str, _Kind]]:
    """Return path and kind of every module that has all matrices of a kind, in the order of the weights."""
    matrices = [name.removesuffix(".weight") for name, role in checkpoint.roles.items() if role == "linear"]
    there = set(matrices)
    found = []
    for name in matrices:
        for kind in kinds:
            path = name.removesuffix(f".{kind.into[0]}")
            if path != name and all(f"{path}.{other}" in there for other in kind.names):
                found.append((path, kind))
                break
    return found


def _heads(checkpoint: Checkpoint, module: nn.Module, path: str, kind: _Attention) -> _Heads | None:
    """Return the heads of an attention; None where its module does not say how wide they are."""
    owner: Any = module.get_submodule(_joined(path, kind.owner))
    width = next((getattr(owner, name) for name in _WIDTHS if hasattr(owner, name)), None)
    if not isinstance(width, int):
        return None
    queries = _shape(checkpoint, f"{path}.{kind.out}")[1] // width
    if len(kind.into) == 1:
        return _Heads(
            queries, (_shape(checkpoint, f"{path}.{kind.into[0]}")[0] // width - queries) // 2, width
        )
    return _Heads(queries, _shape(checkpoint, f"{path}.{kind.into[1]}")[0] // width, width)


def _groups(path: str, kind: _Attention, heads: _Heads) -> Parts:
    width, groups = heads.width, heads.groups
    queries = torch.arange(heads.queries * width).view(groups, -1)
    keys = torch.arange(groups * width).view(groups, width)
    if len(kind.into) == 1:
        values = keys + (heads.queries + groups) * width
        rows = {kind.into[0]: torch.cat((queries, keys + heads.queries * width, values), 1)}
    else:
        rows = dict(zip(kind.into, (queries, keys, keys), strict=True))
    return Parts(path, {f"{path}.{name}": part for name, part in rows.items()}, f"{path}.{kind.out}", queries)


def _refuse_wide_norms(checkpoint: Checkpoint, path: str, width: int, asking: str) -> None:
    for norm in _HEAD_NORMS:
        weight = checkpoint.weights.get(f"{path}.{norm}.weight")
        if weight is not None and weight.shape != (width,):
            raise InputError(
                f"{asking}: {path}.{norm} is one norm over all heads: without some of them the others would change; "
                "leave the pass out"
            )


def _refuse_unknown(checkpoint: Checkpoint, path: str, known: Sequence[str], asking: str) -> None:
    """Refuse what might belong to a part and would be left behind: a gate per head, a scale per neuron."""
    for name in checkpoint.weights:
        rest = name.removeprefix(f"{path}.")
        if rest != name and rest.rpartition(".")[0] not in known:
            raise InputError(
                f"{asking}: {name} may belong to parts of {path}, and is not known here; leave the pass out"
            )


def _some(found: Sequence[Parts], checkpoint: Checkpoint, what: str, asking: str) -> tuple[Parts, ...]:
    if not found:
        raise InputError(
            f"{asking}: {checkpoint.config.model_type} has no {what} whose matrices are known; leave the pass out"
        )
    for parts in found:
        whole = {name: rows.numel() == _shape(checkpoint, name)[0] for name, rows in parts.rows.items()}
        whole[parts.out] = parts.columns.numel() == _shape(checkpoint, parts.out)[1]
        if strange := [name for name, is_whole in whole.items() if not is_whole]:
            raise InputError(
                f"{asking}: {strange[0]} has another shape than the parts of {parts.path} explain; leave the pass out"
            )
    return tuple(found)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    return checkpoint.weights[f"{name}.weight"].shape


def _joined(path: str, owner: str) -> str:
    return f"{path}.{owner}" if owner else path
