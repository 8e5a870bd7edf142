"""What is publicly known to keep an operator of an ML Program off the Neural Engine or the GPU, each with its source.

Apple documents no list: which unit runs what depends on chip, system, sizes and neighbours ("There is no static
documentation", apple/coremltools issue 1780). A rule here is what Apple's guides and engineers say, or what somebody
measured and published. That no rule names an operator is no promise that a unit takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slm_export.exporters.coreml_sizes import CONSTEXPR, RECURRENT, Call, Shape
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.program import Name, Operation

NEURAL_ENGINE, GPU = "Neural Engine", "GPU"
UNITS = (NEURAL_ENGINE, GPU)
_MOST_AXES = 4
_LARGEST_AXIS = 16_384
_STATE_MULTIPLE = 32
_GUIDE = "https://apple.github.io/coremltools/docs-guides/source/"
_ISSUES = "https://github.com/apple/coremltools/issues/"
_SCALED = {
    "constexpr_blockwise_shift_scale": "data",
    "constexpr_sparse_blockwise_shift_scale": "data_mask",
}
"""Operators with scales -> the parameter that has the shape of the matrix."""
_GATHERS = ("gather", "gather_along_axis", "gather_nd")


@dataclass(frozen=True)
class Rule:
    """One thing that keeps operators off a unit."""

    name: str
    unit: str
    reason: str
    source: str
    applies: Callable[[Call, Operation], bool]


def _has_range(call: Call, operation: Operation) -> bool:
    return any(low != high for feature in call.function.inputs for low, high in feature.ranges or ())


def _is_float32(call: Call, operation: Operation) -> bool:
    types = (type.element.dtype for _, type in operation.outputs)
    return operation.kind != "cast" and torch.float32 in types


def _is_blockwise(call: Call, operation: Operation) -> bool:
    return any(_has_blocks(call, name) for name in _names(operation))


def _has_blocks(call: Call, name: str) -> bool:
    maker = call.makers.get(name)
    if maker is None or not maker.kind.startswith(CONSTEXPR):
        return False
    if maker.kind in _SCALED:
        data, scale = call.shape(maker, _SCALED[maker.kind]), call.shape(maker, "scale")
        several = [(blocks, size) for blocks, size in zip(scale, data, strict=True) if blocks > 1]
        if len(several) > 1 or any(blocks != size for blocks, size in several):
            return True
    return any(_has_blocks(call, operand) for operand in _names(maker))


def _has_many_axes(call: Call, operation: Operation) -> bool:
    return any(len(shape) > _MOST_AXES for shape in _shapes(call, operation))


def _has_long_axis(call: Call, operation: Operation) -> bool:
    return any(max(shape, default=0) > _LARGEST_AXIS for shape in _shapes(call, operation))


def _has_odd_state(call: Call, operation: Operation) -> bool:
    return any(state.shape and state.shape[-1] % _STATE_MULTIPLE for state in call.function.states)


def _updates_anywhere(call: Call, operation: Operation) -> bool:
    return operation.kind == "slice_update" and any(
        not isinstance(call.constant(operation, bound), Packed) for bound in ("begin", "end")
    )


def _is(*kinds: str) -> Callable[[Call, Operation], bool]:
    return lambda call, operation: operation.kind in kinds


def _names(operation: Operation) -> list[str]:
    return [part.name for parts in operation.inputs.values() for part in parts if isinstance(part, Name)]


def _shapes(call: Call, operation: Operation) -> list[Shape]:
    """Return the shapes of all tensors that an operation takes and makes."""
    named = (*_names(operation), *(name for name, _ in operation.outputs))
    return [call.sizes[name] for name in named if name in call.sizes]


RULES: tuple[Rule, ...] = (
    Rule(
        "range",
        NEURAL_ENGINE,
        "an input has a range of sizes: only its default size runs there, unless the app loads the model with the "
        "hint reshapeFrequency = infrequent",
        "https://developer.apple.com/forums/thread/724930",
        _has_range,
    ),
    Rule(
        "float32",
        NEURAL_ENGINE,
        "computes in float32, which the CPU and the GPU execute",
        f"{_GUIDE}typed-execution-example.html",
        _is_float32,
    ),
    Rule(
        "blocks",
        NEURAL_ENGINE,
        "a matrix has a scale per block: one per output channel or one per tensor is supported",
        f"{_ISSUES}2510",
        _is_blockwise,
    ),
    Rule(
        "state-width",
        NEURAL_ENGINE,
        f"a state's last dimension is no multiple of {_STATE_MULTIPLE}: the model fails there",
        f"{_ISSUES}2631",
        _has_odd_state,
    ),
    Rule(
        "state-position",
        NEURAL_ENGINE,
        "writes a slice whose place is known only as the program runs",
        "https://github.com/apple/coreai-torch/issues/6",
        _updates_anywhere,
    ),
    Rule(
        "rank",
        NEURAL_ENGINE,
        f"a tensor of more than {_MOST_AXES} dimensions",
        "https://github.com/FluidInference/FluidAudio/pull/679",
        _has_many_axes,
    ),
    Rule(
        "long-axis",
        NEURAL_ENGINE,
        f"a dimension of more than {_LARGEST_AXIS:,}, the most of chips up to A15 and M2 (65,536 from A16 on)",
        "https://github.com/sbryngelson/ANEForge/pull/240",
        _has_long_axis,
    ),
    Rule(
        "gather",
        NEURAL_ENGINE,
        "looks rows up, which stays on the CPU",
        "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
        _is(*_GATHERS),
    ),
    Rule(
        "topk",
        NEURAL_ENGINE,
        "chooses the largest, which stays on the CPU",
        "https://github.com/roboflow/rf-detr/pull/1495",
        _is("topk"),
    ),
    Rule(
        "recurrent",
        NEURAL_ENGINE,
        "recurrent layers are not supported",
        f"{_ISSUES}1780",
        _is(*RECURRENT),
    ),
    Rule(
        "iphone-slice",
        GPU,
        "a slice was seen to run on the CPU of an iPhone, and on the GPU of a Mac",
        f"{_ISSUES}2550",
        _is("slice_by_index"),
    ),
)
"""Every rule; several may name one operator."""

# Both: opt-quantization-perf.html and opt-overview.html of Apple's guide; the second: apple/coremltools issue 1741 too.
PACKED_WHEN = (
    "where they are decompressed as used: blocks of int4 on the GPU, lookup tables on the Neural Engine"
)
EXPANDED_WHEN = "where they are decompressed at load: on the CPU, sometimes on the GPU"
