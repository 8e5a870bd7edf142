"""What a user says of bits and groups, and how it changes the recipe of a device profile.

Apart from the passes themselves, so that a plan can read a recipe without importing torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slm_export.errors import InputError
from slm_export.profile import RecipeStep

GROUP_QUANTIZE = "group-quantize"
PALETTIZE = "palettize"
TABLES = ("bits_by_tensor", "group_by_tensor")
"""Options of a quantizing pass that speak of single matrices."""


@dataclasses.dataclass(frozen=True)
class QuantizationOptions:
    """What the user asked for; None leaves the profile's choice."""

    bits: int | None = None
    group_size: int | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    palettize: int | None = None
    """Bits of tables, in place of codes and scales."""

    def over(self, others: QuantizationOptions) -> QuantizationOptions:
        """Return these with what they leave open taken from others; codes and tables exclude each other."""
        if self.palettize is not None:
            others = dataclasses.replace(others, bits=None, group_size=None)
        elif self.bits is not None or self.group_size is not None:
            others = dataclasses.replace(others, palettize=None)
        return dataclasses.replace(
            others, **{key: bits for key, bits in vars(self).items() if bits is not None}
        )

    @property
    def pass_name(self) -> str | None:
        """The pass that is asked for; None where the options fit any."""
        if self.palettize is not None:
            return PALETTIZE
        return None if self.bits is None and self.group_size is None else GROUP_QUANTIZE

    def overrides(self) -> dict[str, int | None]:
        """Return the options of the pass that are set. ``bits`` alone speaks for embedding and head too.

        4 is the exception, and so are tables: an embedding in 4 bits costs a small model much more than it saves, so
        it is asked for by itself.

        Raises:
            InputError: tables are asked for, and codes too.
        """
        if self.palettize is not None and (self.bits is not None or self.group_size is not None):
            other = "bits" if self.bits is not None else "a group size"
            raise InputError(
                f"palettize {self.palettize} stores tables in place of codes and scales, and {other} of these were "
                "asked for too: give one of the two"
            )
        chosen: dict[str, int | None] = {} if self.palettize is None else {"bits": self.palettize}
        if self.bits is not None:
            chosen["bits"] = self.bits
            if self.bits != 4:
                chosen |= {"embedding_bits": self.bits, "head_bits": None}
        for option, key in (
            (self.group_size, "group"),
            (self.embedding_bits, "embedding_bits"),
            (self.head_bits, "head_bits"),
        ):
            if option is not None:
                chosen[key] = option
        return chosen


def merged(
    steps: Sequence[RecipeStep], options: QuantizationOptions, quantizing: Collection[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return name and options of every pass of a profile's recipe, with the user's options put in.

    Given   quantizing: the names of the passes that put matrices on the integer grid

    Raises:
        InputError: the options contradict each other.
    """
    overrides = options.overrides()
    passes: list[tuple[str, dict[str, Any]]] = []
    quantizes = False
    for step in steps:
        name, chosen = step.pass_name, dict(step.options)
        if name in quantizing or name == PALETTIZE:
            if options.pass_name and (options.pass_name == PALETTIZE) != (name == PALETTIZE):
                name, chosen = options.pass_name, _of_both(chosen)
            # What speaks for all matrices leaves none of its own: otherwise --bits 8 would not mean 8.
            kept = {key: value for key, value in chosen.items() if not overrides or key not in TABLES}
            chosen, quantizes = {**kept, **overrides}, True
        passes.append((name, chosen))
    if overrides and not quantizes:
        passes.append((options.pass_name or GROUP_QUANTIZE, dict(overrides)))
    return passes


def _of_both(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what codes and tables both know; 6 bits exist in tables alone."""
    return {
        key: value
        for key, value in options.items()
        if key in ("embedding_bits", "head_bits") and value in (4, 8, 16, 32)
    }
