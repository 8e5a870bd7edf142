"""What of an artifact runs in fast kernels or on a unit of the chip, and what does not: frozen values of a report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Risk:
    """One publicly known reason for operators of an artifact to leave a unit."""

    unit: str
    reason: str
    source: str
    """Where it is published."""
    operators: dict[str, int]
    """Name -> how many; an operator may be named by several reasons."""
    multiplications: int
    """Their multiply-adds in one call."""


@dataclass(frozen=True)
class LoadMemory:
    """Estimate of what an artifact's constants take once it is loaded, in bytes; activations are not in it."""

    packed_bytes: int
    """As they are stored."""
    expanded_bytes: int
    """With every compressed constant in the type that it is declared to have, mostly float16."""
    state_bytes: int
    """The KV cache, which comes on top."""
    packed_when: str
    expanded_when: str


@dataclass(frozen=True)
class Delegation:
    """What of an artifact runs in the library of fast kernels, or on the unit, that its runtime hands work to.

    Where the runtime cannot be asked it is predicted from public knowledge, and ``delegate`` says so.
    """

    delegate: str
    function: str
    operators: int
    taken: int
    multiplications: int
    """Multiply-adds of matrix products in one call."""
    taken_multiplications: int
    rest: dict[str, int]
    """Operators that were not taken: name -> how many."""
    predicted: bool = False
    """Told by rules on the file, not by the runtime."""
    units: dict[str, float] = field(default_factory=dict)
    """Every unit -> the share of multiply-adds that nothing known keeps off it."""
    risks: tuple[Risk, ...] = ()
    memory: LoadMemory | None = None

    @property
    def accelerated(self) -> float:
        """The share of multiply-adds that is taken; 0 where there are none."""
        return self.taken_multiplications / max(1, self.multiplications)
