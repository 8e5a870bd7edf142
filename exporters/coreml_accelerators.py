"""Which units may run a saved Core ML package, and what its constants take in memory: predicted, never measured.

Core ML decides on the device, and can be asked there alone (`MLComputePlan`, Xcode's performance report). What can be
told of the file is where a publicly known rule keeps an operator off a unit (`coreml_accelerator_rules`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from slm_export.delegation import Delegation, LoadMemory, Risk
from slm_export.exporters.coreml_accelerator_rules import (
    EXPANDED_WHEN,
    GPU,
    NEURAL_ENGINE,
    PACKED_WHEN,
    RULES,
    UNITS,
)
from slm_export.exporters.coreml_sizes import CONSTEXPR, Call
from slm_export.exporters.mil.blob import Packed, size_of
from slm_export.exporters.mil.package import Function, Package
from slm_export.exporters.mil.program import Name, Operation

PREDICTED = "predicted from public rules, not measured"


def delegation(path: Path) -> Delegation:
    """Return the prediction for the function of a package of which its preferred unit takes least.

    Raises:
        InputError: the package is not whole, or a size in it depends on values that are known only as it runs.
    """
    package = Package.open(path)
    memory = load_memory(package)
    return min(
        (predict(function, memory) for function in package.functions.values()),
        key=lambda found: found.accelerated,
    )


def predict(function: Function, memory: LoadMemory | None = None) -> Delegation:
    """Return what no rule keeps off the preferred unit of a function, in a call with its largest inputs.

    The Neural Engine is preferred where it may take any product at all, else the GPU.
    """
    call = Call.of(function)
    operations = call.operations
    products = [call.multiply_adds(operation) for operation in operations]
    total = sum(products)
    risks: list[Risk] = []
    kept_off: dict[str, set[int]] = {unit: set() for unit in UNITS}
    for rule in RULES:
        hit = [index for index, operation in enumerate(operations) if rule.applies(call, operation)]
        if hit:
            kinds = Counter(operations[index].kind for index in hit)
            affected = sum(products[index] for index in hit)
            risks.append(Risk(rule.unit, rule.reason, rule.source, dict(kinds), affected))
            kept_off[rule.unit].update(hit)
    taken = {unit: total - sum(products[index] for index in indices) for unit, indices in kept_off.items()}
    unit = NEURAL_ENGINE if taken[NEURAL_ENGINE] else GPU
    rest = Counter(operations[index].kind for index in kept_off[unit])
    return Delegation(
        delegate=f"{unit} ({PREDICTED})",
        function=function.name,
        operators=len(operations),
        taken=len(operations) - len(kept_off[unit]),
        multiplications=total,
        taken_multiplications=taken[unit],
        rest=dict(rest),
        predicted=True,
        units={name: count / max(1, total) for name, count in taken.items()},
        risks=tuple(risks),
        memory=memory,
    )


def load_memory(package: Package) -> LoadMemory:
    """Return what a package's constants take: as they are stored, and all expanded.

    Functions share what they name together; each state counts once, because an app hands it from one to the other.
    """
    stored: dict[int, int] = {}
    compressed: dict[int, int] = {}
    expanded: dict[tuple[int, ...], int] = {}
    states: dict[str, int] = {}
    for function in package.functions.values():
        makers = {name: operation for operation in function.operations for name, _ in operation.outputs}
        for operation in function.operations:
            own = _parts(operation, {})
            stored.update(own)
            if operation.kind.startswith(CONSTEXPR):
                continue
            for name in _names(operation):
                maker = makers.get(name)
                if maker is not None and maker.kind.startswith(CONSTEXPR):
                    parts = _parts(maker, makers)
                    compressed.update(parts)
                    (_, type), *_ = maker.outputs
                    expanded[tuple(sorted(parts))] = size_of(type.element, type.fixed)[0]
        for state in function.states:
            states[state.name] = math.prod(state.shape) * state.dtype.itemsize
    packed = sum(stored.values())
    return LoadMemory(
        packed_bytes=packed,
        expanded_bytes=packed - sum(compressed.values()) + sum(expanded.values()),
        state_bytes=sum(states.values()),
        packed_when=PACKED_WHEN,
        expanded_when=EXPANDED_WHEN,
    )


def _names(operation: Operation) -> list[str]:
    return [part.name for parts in operation.inputs.values() for part in parts if isinstance(part, Name)]


def _parts(operation: Operation, makers: Mapping[str, Operation]) -> dict[int, int]:
    """Return the constants that an operation holds, and through ``makers`` those of its operands: identity -> bytes."""
    found = {
        id(part): size_of(part.element, part.shape)[0]
        for parts in operation.inputs.values()
        for part in parts
        if isinstance(part, Packed)
    }
    for name in _names(operation):
        if name in makers:
            found |= _parts(makers[name], makers)
    return found
