"""MIL's states. Pages: ``iOS18.states``, ``coreml_dialect.ops``.

A state is the tensor that the caller holds; it is changed in place. `mil.sharing` decides where a copy
can be saved.
"""

from __future__ import annotations

from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.registry import operator


@operator("read_state", since=18, view=True)
def read_state(input: Tensor, *, copied: bool = False) -> Tensor:
    """The content of a state: iOS18.states.

    Given   copied: the state is written while this content is still in use
    """
    return input.clone() if copied else input


@operator("write_state", since=18)
def write_state(input: Tensor, data: Tensor) -> tuple[()]:
    """Replace the content of a state: coreml_dialect.ops (what `coreml_update_state` is in a saved program)."""
    if input.dtype != data.dtype or input.shape != data.shape:
        raise InputError(f"{data.dtype} {list(data.shape)} for a state of {input.dtype} {list(input.shape)}")
    shared = data.untyped_storage().data_ptr() == input.untyped_storage().data_ptr()
    if not shared:
        input.copy_(data)
    elif data.data_ptr() != input.data_ptr() or data.stride() != input.stride():
        input.copy_(data.clone())
    return ()


@operator("coreml_update_state", since=18, view=True)
def coreml_update_state(state: Tensor, value: Tensor, *, copied: bool = False) -> Tensor:
    """Replace the content of a state, then read it: coreml_dialect.ops."""
    write_state(state, value)
    return read_state(state, copied=copied)
