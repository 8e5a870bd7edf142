"""Where a state may be read and updated without a copy.

By the specification ``read_state`` copies a state, ``slice_update`` makes a new tensor and ``write_state`` copies it
back: three copies of a cache for one token. Here a read is the state itself, an update of it happens in place and
the write finds nothing left to do, wherever no later operation can tell the difference:

- values are followed through operators that return views of their operands, so that what may share memory is known;
- a read is copied after all where the state changes while the read, or a view of it, is still used;
- an update is in place where nothing that may share its memory is used after it, and, on a state, where the
  next that happens to that state is the write of this very update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slm_export.exporters.mil.program import Name, Operation

STATES = {"read_state": "input", "write_state": "input", "coreml_update_state": "state"}
"""The operators that take a state, and the parameter that does."""
_FIXED = ("fixed", "", -1)
_Root = tuple[str, str, int]
"""What owns memory: ("state", name, position of the read), ("value", name, position) or _FIXED: not ours to change."""


@dataclass(frozen=True)
class Sharing:
    """What a program's operations may do, by position, and what must not leave it uncopied."""

    copied: frozenset[int]
    """Reads that copy."""
    in_place: frozenset[int]
    """Updates that change their operand."""
    guarded: frozenset[str]
    """Results that share memory with a state, an input or a constant."""


def plan_sharing(
    operations: Sequence[Operation],
    results: Sequence[str],
    views: Sequence[bool],
    fixed: Sequence[str],
) -> Sharing:
    """Decide for a whole function.

    Given   views: whether the result of each operation may share memory with its operands
            fixed: names of inputs and constants
    """
    copied: frozenset[int] = frozenset()
    while True:
        plan = _Plan(operations, results, views, fixed, copied)
        if plan.endangered <= copied:
            shared = {
                name for name in results if any(kind != "value" for kind, _, _ in plan.roots.get(name, ()))
            }
            return Sharing(copied, frozenset(plan.in_place), frozenset(shared))
        copied |= plan.endangered


class _Plan:
    """One pass over the program, given which reads copy; `endangered` are those that should have."""

    def __init__(
        self,
        operations: Sequence[Operation],
        results: Sequence[str],
        views: Sequence[bool],
        fixed: Sequence[str],
        copied: frozenset[int],
    ) -> None:
        self._operations, self._copied = operations, copied
        self.roots: dict[str, frozenset[_Root]] = {name: frozenset([_FIXED]) for name in fixed}
        self.in_place: set[int] = set()
        self.endangered: set[int] = set()
        self._last = last_uses(operations, results)
        self._exact: dict[str, str] = {}
        """Values that are all of a state's own memory -> the state."""
        for position, (operation, view) in enumerate(zip(operations, views, strict=True)):
            self._visit(position, operation, view)

    def _visit(self, position: int, operation: Operation, view: bool) -> None:
        names = [name for name, _ in operation.outputs]
        fresh = frozenset([("value", name, position) for name in names])
        if operation.kind in ("write_state", "coreml_update_state"):
            self._write(position, operation)
        if operation.kind in ("read_state", "coreml_update_state"):
            state = state_of(operation)
            if position not in self._copied:
                fresh = frozenset([("state", state, position)])
                self._exact.update(dict.fromkeys(names, state))
        elif operation.kind == "slice_update":
            if self._may_update(position, operation):
                self.in_place.add(position)
                source = _name(operation, "x")
                fresh = self.roots[source]
                if source in self._exact:
                    self._exact.update(dict.fromkeys(names, self._exact[source]))
        elif view:
            sources = [self.roots.get(name, frozenset()) for name in _names(operation)]
            fresh = frozenset().union(*sources)
        for name in names:
            self.roots[name] = fresh

    def _write(self, position: int, operation: Operation) -> None:
        state = state_of(operation)
        data = _name(operation, "data" if operation.kind == "write_state" else "value")
        if self._exact.get(data) == state:
            return
        for name, roots in self.roots.items():
            if self._last.get(name, -1) > position:
                self.endangered |= {at for kind, owner, at in roots if (kind, owner) == ("state", state)}

    def _may_update(self, position: int, operation: Operation) -> bool:
        source = _name(operation, "x")
        roots = self.roots.get(source, frozenset([_FIXED]))
        if len(roots) != 1 or roots == {_FIXED}:
            return False
        [(kind, owner, _)] = roots
        group = {
            name
            for name, owners in self.roots.items()
            if any(root[:2] == (kind, owner) for root in owners) or (_FIXED in owners and name == source)
        }
        if any(self._last.get(name, -1) > position for name in group):
            return False
        if [name for name in _names(operation) if name in group] != [source]:
            return False
        return kind == "value" or self._is_written_next(position, operation, owner)

    def _is_written_next(self, position: int, operation: Operation, state: str) -> bool:
        """Return whether the next operation on a state writes this update, or an update of it and so on, to it."""
        made = {operation.outputs[0][0]}
        for later in self._operations[position + 1 :]:
            if later.kind == "slice_update" and _name(later, "x") in made:
                made.add(later.outputs[0][0])
            elif later.kind == "write_state" and state_of(later) == state:
                return _name(later, "data") in made
            elif later.kind == "coreml_update_state" and state_of(later) == state:
                return _name(later, "value") in made
            elif later.kind == "read_state" and state_of(later) == state:
                return False
        return False


def state_of(operation: Operation) -> str:
    """Return the name of the state that an operation reads or writes."""
    return _name(operation, STATES[operation.kind])


def _name(operation: Operation, parameter: str) -> str:
    operand = operation.inputs.get(parameter, ())
    return operand[0].name if len(operand) == 1 and isinstance(operand[0], Name) else ""


def _names(operation: Operation) -> list[str]:
    return [part.name for operand in operation.inputs.values() for part in operand if isinstance(part, Name)]


def last_uses(operations: Sequence[Operation], results: Sequence[str]) -> Mapping[str, int]:
    """Return the position of each value's last use, one behind the last operation for results."""
    last = {name: position for position, operation in enumerate(operations) for name in _names(operation)}
    return last | dict.fromkeys(results, len(operations))
