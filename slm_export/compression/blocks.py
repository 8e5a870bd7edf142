"""The numbered blocks of a transformers module, taken apart: what each is given, and the linear layers inside.

What a block needs beside its hidden states (rotations, masks) is seen by running the model once, so no family has
to be known. A model whose blocks are not fed by each other (ALBERT repeats one, FlauBERT keeps lists side by side)
is told from one whose are by the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.graph.dialect import ReferenceDialect
from slm_export.graph.model import Encoder
from slm_export.weights import Weight, float_blocks

_PART = 1 << 22  # values of a matrix outside the block at work that stand in memory as float32 at a time


class CannotWalk(Exception):
    """The model is no sequence of blocks, each fed by the one before it; says why."""


class LiveLinear(nn.Module):
    """A linear layer whose matrix stands in memory while its block is at work, and is read in parts otherwise."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.source = weight
        self.matrix: Tensor | None = None
        """float32 (out, in), or what computes it: gradients go through."""
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in) times the matrix, (..., out)."""
        if self.matrix is not None:
            return F.linear(x, self.matrix, self.bias)
        result = torch.cat([F.linear(x, part) for part in float_blocks(self.source, _PART)], dim=-1)
        return result if self.bias is None else result + self.bias


class LiveDialect(ReferenceDialect):
    """The reference with linear layers whose matrices can be replaced."""

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return the layer; its matrix is not in memory yet."""
        return LiveLinear(weight, bias)


@dataclass(frozen=True)
class Call:
    """What a block is given beside the hidden states, and how they go in and come out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool
    """Whether the hidden states come as a keyword."""
    tupled: bool
    """Whether the block returns a tuple, hidden states first."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return what a block makes of hidden states (windows, tokens, width)."""
        if self.named:
            output = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if self.tupled else output
        return result


def run_model(model: nn.Module, ids: Tensor) -> Any:
    """Run a decoder or an `Encoder` on token ids (windows, tokens), none of them padding."""
    if isinstance(model, Encoder):
        return model(ids, torch.ones_like(ids))
    return model(input_ids=ids, use_cache=False)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and modules of the longest numbered list."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    if not lists:
        raise CannotWalk("it has no numbered blocks")
    path = max(lists, key=lambda path: len(lists[path]))
    return path, lists[path]


def checkpoint_path(model: nn.Module, path: str) -> str:
    """Return what the checkpoint calls a module."""
    return path.removeprefix("model.") if isinstance(model, Encoder) else path


def linears_of(model: nn.Module, path: str) -> dict[str, LiveLinear]:
    """Return the linear layers below a path by the names of their matrices in the checkpoint; "" is the whole model."""
    return {
        f"{checkpoint_path(model, f'{path}.{name}'.strip('.'))}.weight": part
        for name, part in model.get_submodule(path).named_modules()
        if isinstance(part, LiveLinear)
    }


def record_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> list[Call]:
    """Run the model on ids (windows, tokens), and return what every block was given.

    Raises:
        CannotWalk: a block is not run once, behind the one before it and on nothing but its output.
    """
    seen: list[tuple[int, Tensor, Tensor, Call]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if named else args[0]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        tupled = isinstance(output, tuple)
        call = Call(args if named else args[1:], rest, named, tupled)
        seen.append((places[block], hidden, output[0] if tupled else output, call))

    places = {block: index for index, block in enumerate(blocks)}
    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            run_model(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if [index for index, *_ in seen] != list(range(len(blocks))):
        raise CannotWalk("its blocks are not run one after the other, each once")
    for (_, _, output, _), (index, hidden, _, _) in pairwise(seen):
        if hidden is not output:
            raise CannotWalk(f"something lies between blocks {index - 1} and {index}")
    return [call for *_, call in seen]


def same_call(one: Any, other: Any) -> bool:
    """Return whether two recorded values are alike, tensors by their values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Call):
        return same_call((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_call(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_call, one, other))
    return bool(one == other)


def stages_of(run: Callable[[], Any], linears: Mapping[str, LiveLinear]) -> tuple[tuple[str, ...], ...]:
    """Return the linear layers in the order of their use; those that are given the same tensor are one stage."""
    used: list[tuple[str, Tensor]] = []
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: used.append((name, args[0])))
        for name, linear in linears.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    stages: list[tuple[list[str], Tensor]] = []
    for name, x in used:
        same = next((names for names, given in stages if given is x), None)
        if same is None:
            stages.append(([name], x))
        elif name not in same:
            same.append(name)
    return tuple(tuple(names) for names, _ in stages)


class _Reached(Exception):
    """What was waited for has happened: the rest of the run is not needed."""


@contextmanager
def stopping_at(part: nn.Module) -> Iterator[Callable[[Callable[[], Any]], Tensor]]:
    """Yield what runs a function until ``part`` is called, and returns the tensor that it was given."""
    given: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def run(function: Callable[[], Any]) -> Tensor:
        with suppress(_Reached):
            function()
        return given.pop()

    hook = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield run
    finally:
        hook.remove()


def tensors_alike(calls: Sequence[Call], others: Sequence[Call]) -> bool:
    """Return whether every block was given the same beside its hidden states."""
    return len(calls) == len(others) and all(map(same_call, calls, others))
