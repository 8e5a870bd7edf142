"""What an evaluator does for a function, worked out once: operators, operands, lifetimes, constants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.constant import Constant, Pool, Stored
from slm_export.exporters.mil.operators.registry import Operator, find
from slm_export.exporters.mil.package import Function, Package
from slm_export.exporters.mil.program import Name, Operation, TensorType, Value
from slm_export.exporters.mil.sharing import STATES, last_uses, plan_sharing

_FAMILIES = (
    "activation",
    "constexpr",
    "elementwise",
    "gather",
    "linear",
    "normalization",
    "reduction",
    "shape",
    "slice",
    "state",
    "tensor",
)
for _family in _FAMILIES:
    importlib.import_module(f"slm_export.exporters.mil.operators.{_family}")

LISTS = frozenset({"values", "ref_tensors", "begins", "ends", "end_masks"})
"""Parameters that MIL types as tuples."""


class Output(NamedTuple):
    """Where a result goes, and what it has to be."""

    name: str
    slot: int
    type: TensorType
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None


class Step(NamedTuple):
    """One operation, ready to run."""

    where: str
    run: Callable[..., Any]
    """Its constant operands are bound already."""
    arguments: tuple[tuple[str, int], ...]
    """The others by parameter, and the slot of each."""
    lists: tuple[tuple[str, tuple[int | Tensor, ...]], ...]
    """Parameters that are lists: slots and constants."""
    outputs: tuple[Output, ...]
    release: tuple[int, ...]
    """Slots that nothing needs any more."""


@dataclass(frozen=True)
class Plan:
    """All steps of a function, and how values get in and out."""

    steps: tuple[Step, ...]
    slots: int
    fixed: tuple[tuple[int, Tensor], ...]
    """Slots of constants that are results themselves."""
    arguments: Mapping[str, int]
    results: tuple[tuple[str, int, bool], ...]
    """Name, slot, and whether a copy has to leave."""


def make_plan(package: Package, function: Function, budget: int) -> Plan:
    """Work out how to run a function; raise `InputError` where that cannot be done.

    Given   budget: bytes of matrices that evaluators of the package may keep as float32
    """
    operators = _find(package, function)
    return _Planner(package, function, package.prepared.setdefault("pool", Pool(budget))).plan(operators)


def _find(package: Package, function: Function) -> list[Operator | None]:
    """Return the operator of each operation (None: a const), all that are unknown named together."""
    unknown: dict[str, list[str]] = {}
    found = []
    for operation in function.operations:
        operator = find(operation.kind, function.opset)
        if operator is None and operation.kind != "const":
            unknown.setdefault(operation.kind, []).append(operation.where)
        found.append(operator)
    if unknown:
        places = "; ".join(f"{kind} ({len(at)}: {', '.join(at)})" for kind, at in sorted(unknown.items()))
        raise InputError(f"{package.path}: operators that are not known for iOS {function.opset}: {places}")
    return found


class _Planner:
    def __init__(self, package: Package, function: Function, pool: Pool) -> None:
        self._package, self._function, self._pool = package, function, pool
        self._constants: dict[str, Constant | str] = {}
        self._slots = {name: slot for slot, name in enumerate(function.arguments)}

    def plan(self, operators: Sequence[Operator | None]) -> Plan:
        function, dynamic = self._function, list[tuple[Operation, Operator]]()
        for operation, operator in zip(function.operations, operators, strict=True):
            try:
                if operator is None or operator.constant:
                    self._constants.update(self._folded(operation, operator))
                else:
                    self._check(operation, operator)
                    dynamic.append((operation, operator))
            except (InputError, RuntimeError, ValueError, TypeError, IndexError) as error:
                raise InputError(f"{operation.where}: {error}") from error
        operations = [operation for operation, _ in dynamic]
        sharing = plan_sharing(
            operations,
            function.results,
            [operator.view for _, operator in dynamic],
            [*function.arguments, *self._constants],
        )
        unneeded = self._unneeded(operations)
        steps = []
        for position, (operation, operator) in enumerate(dynamic):
            extra = {"in_place": True} if position in sharing.in_place else {}
            extra |= {"copied": True} if position in sharing.copied else {}
            steps.append(self._step(operation, operator, extra, unneeded[position]))
        described = {feature.name for feature in function.outputs}
        names = [name for name in function.results if name in described]
        fixed = tuple(self._fixed(name) for name in names if name in self._constants)
        results = tuple((name, self._slots[name], name in sharing.guarded) for name in names)
        return Plan(tuple(steps), len(self._slots), fixed, self._slots, results)

    def _folded(self, operation: Operation, operator: Operator | None) -> dict[str, Constant | str]:
        """Return what an operation on constants makes, by name; nothing is read yet."""
        operands = {name: self._constant(operand) for name, operand in operation.inputs.items()}
        results: tuple[Constant | str, ...]
        if operator is None:
            if set(operands) != {"val"}:
                raise InputError(f"has the operands {sorted(operands)}, not 'val'")
            results = (operands["val"],)
        else:
            operator.check(list(operands))
            key = (operation.kind, operator.since, *sorted((k, id(v)) for k, v in operands.items()))
            results = self._pool.once(key, lambda: operator.run(**operands), operands)
        if len(results) != len(operation.outputs):
            raise InputError(f"makes {len(results)} values, declared are {len(operation.outputs)}")
        for made, (_, type) in zip(results, operation.outputs, strict=True):
            if isinstance(made, Constant) and (
                made.dtype != type.element.dtype or not type.accepts(made.shape)
            ):
                raise InputError(
                    f"is declared {type}, but is {made.dtype} {list(made.shape)}; the conversion is at fault"
                )
        return {name: made for made, (name, _) in zip(results, operation.outputs, strict=True)}

    def _constant(self, operand: tuple[Name | Value, ...]) -> Constant | str:
        if len(operand) != 1:
            raise InputError(f"{len(operand)} operands where one belongs")
        made = self._resolved(operand[0])
        if made is None:
            raise InputError(f"takes constants only, not '{operand[0]}'")
        return made

    def _resolved(self, part: Name | Value) -> Constant | str | None:
        """Return a constant operand; None for one that is known when it runs only."""
        if isinstance(part, Name):
            return self._constants.get(part.name)
        if isinstance(part, str):
            return part
        return self._pool.stored(part)

    def _check(self, operation: Operation, operator: Operator) -> None:
        operator.check(list(operation.inputs))
        for parameter, operand in operation.inputs.items():
            if len(operand) != 1 and parameter not in LISTS:
                raise InputError(f"'{parameter}' takes one operand, not {len(operand)}")
            for part in operand:
                type = self._function.arguments.get(part.name) if isinstance(part, Name) else None
                is_state, wants = type is not None and type.state, STATES.get(operation.kind) == parameter
                if is_state != wants:
                    raise InputError(f"'{parameter}' {'has to be' if wants else 'cannot be'} a state")

    def _unneeded(self, operations: Sequence[Operation]) -> list[list[str]]:
        """Return, for each operation, the values that nothing after it uses."""
        last = last_uses(operations, self._function.results)
        unneeded: list[list[str]] = [[] for _ in operations]
        for position, operation in enumerate(operations):
            for name, _ in operation.outputs:
                if last.get(name, position) < len(operations):
                    unneeded[last.get(name, position)].append(name)
        return unneeded

    def _step(
        self, operation: Operation, operator: Operator, extra: dict[str, Any], unneeded: list[str]
    ) -> Step:
        bound, late = dict[str, Any](extra), dict[str, Constant]()
        arguments, lists = list[tuple[str, int]](), list[tuple[str, tuple[int | Tensor, ...]]]()
        for parameter, operand in operation.inputs.items():
            if parameter in LISTS:
                lists.append((parameter, tuple(self._part(part) for part in operand)))
                continue
            made = self._resolved(operand[0])
            if made is None:
                assert isinstance(operand[0], Name)
                arguments.append((parameter, self._slots[operand[0].name]))
            elif isinstance(made, str) or parameter in operator.lazy:
                bound[parameter] = made
            elif parameter in operator.sizes:
                bound[parameter] = made.tensor().tolist()
            elif isinstance(made, Stored):
                bound[parameter] = made.tensor()
            else:
                late[parameter] = made
        outputs = []
        for name, type in operation.outputs:
            self._slots[name] = len(self._slots)
            outputs.append(Output(name, self._slots[name], type, type.element.dtype, type.shape))
        run = partial(_densely, operator.run, late, **bound) if late else partial(operator.run, **bound)
        release = tuple(self._slots[name] for name in unneeded)
        return Step(operation.where, run, tuple(arguments), tuple(lists), tuple(outputs), release)

    def _part(self, part: Name | Value) -> int | Tensor:
        made = self._resolved(part)
        if isinstance(made, str):
            raise InputError(f"{self._package.path}: a text '{made}' in a list of tensors")
        if made is not None:
            return made.tensor()
        assert isinstance(part, Name)
        return self._slots[part.name]

    def _fixed(self, name: str) -> tuple[int, Tensor]:
        constant = self._constants[name]
        if isinstance(constant, str):
            raise InputError(f"{self._package.path}: returns the text '{name}'")
        self._slots[name] = len(self._slots)
        return self._slots[name], constant.tensor()


def _densely(run: Callable[..., Any], late: Mapping[str, Constant], **operands: Any) -> Any:
    """Run an operator that wants tensors on constants that are not kept as such."""
    return run(**operands, **{name: constant.tensor() for name, constant in late.items()})
