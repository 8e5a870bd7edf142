"""What Google Play takes of a model, and in which way: the app itself, an asset pack, or neither.

Limits: "Optimize your app's size and stay within Google Play app size limits", Play Console Help, answer 9859372. They
are of the compressed download; weights hardly compress, so the size of the files stands for it. A megabyte is taken as
1,000,000 bytes, the smaller of the two readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BASE_MODULE = 200_000_000
ASSET_PACK = 1_500_000_000

Delivery = Literal["app", "asset pack", "own download"]


@dataclass(frozen=True)
class Fit:
    """How files of a size reach a phone, and why."""

    delivery: Delivery
    note: str


def fit(size: int) -> Fit:
    """Return how ``size`` bytes of model and tokenizer can be delivered through Google Play."""
    said = f"The model's files have {size / 1e6:,.1f} MB"
    if size < BASE_MODULE:
        rest = (BASE_MODULE - size) / 1e6
        note = f"{said}: they fit into the app, of which Play takes 200 MB; {rest:,.1f} MB are left"
        return Fit("app", f"{note}; an asset pack fits too.")
    if size <= ASSET_PACK:
        return Fit(
            "asset pack",
            f"{said}: too many for the app, of which Play takes 200 MB; an asset pack may have 1.5 GB.",
        )
    return Fit(
        "own download",
        f"{said}: too many for Play, of whose asset packs each may have 1.5 GB. The app has to download them itself; "
        "or export with fewer bits.",
    )
