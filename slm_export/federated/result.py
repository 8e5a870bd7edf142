"""What a federation leaves: an adapter (or, of a head, a checkpoint), and a manifest of how it came about.

OUT/
  adapter_config.json, adapter_model.safetensors    as peft saves them; a MODEL for ``slm-export``
  federation.json                                   rounds, refused updates, what was spent; nothing personal
  learning.json                                     the same for bundles that are made of it, and a list of all files
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_export import __version__
from slm_export.bundles.checksums import tree_files
from slm_export.federated.accounting import Ledger
from slm_export.federated.rounds import budget_of
from slm_export.federated.settings import Federation
from slm_export.federated.state import Round, State
from slm_export.jsonfile import read_object
from slm_export.machine import machine_errors
from slm_export.source.learned import LEARNING, Learned

if TYPE_CHECKING:
    from slm_export.federated.base import Base

MANIFEST = "federation.json"
SCHEMA = 1
_TOOLS = ("flwr", "opacus", "torch", "transformers", "peft", "numpy")


def write_result(base: Base, base_sha256: str, federation: Federation, state: State, folder: Path) -> None:
    """Fill an empty folder.

    Raises:
        MachineError: the disk is full.
    """
    from slm_export.federated.base import save

    told = manifest_of(base.folder.resolve().name, base_sha256, federation, state)
    learned = Learned(
        by="federate",
        rows=(),
        lineage={"base": told["base"]},
        settings={
            name: told[name]
            for name in ("learns", "clients", "rounds", "refused", "privacy", "began_with", "settings_sha256")
        },
    )
    save(base, state.tensors, folder)
    with machine_errors("write the result", folder):
        _write({"schema": SCHEMA, "federation": told}, folder / MANIFEST)
        files = [entry.model_dump() for entry in tree_files(folder)]
        _write({"schema": 1, "learned": learned.model_dump(mode="json"), "files": files}, folder / LEARNING)


def manifest_of(name: str, sha256: str, federation: Federation, state: State) -> dict[str, Any]:
    """Return what ``federation.json`` says, as JSON values."""
    rounds = state.rounds
    return {
        "base": {"name": name, "source_sha256": sha256},
        "began_with": _began_with(federation),
        "learns": federation.model.learns,
        "rank": federation.model.rank if federation.model.learns == "adapter" else None,
        "settings_sha256": federation.sha256,
        "clients": federation.rounds.clients,
        "rounds": {
            "asked": federation.rounds.number,
            "done": len(rounds),
            "that_changed": sum(done.changed for done in rounds),
            "stopped": state.stopped,
        },
        **_counts(federation, state),
        "aggregation": federation.aggregation.model_dump(mode="json"),
        "privacy": privacy_of(federation, state),
        "toolchain": {"slm-export": __version__} | {tool: version(tool) for tool in _TOOLS},
    }


def _counts(federation: Federation, state: State) -> dict[str, Any]:
    """Return how many took part.

    None of it where clients are drawn with user-level privacy: what the accountant counts holds while nobody knows how
    many were drawn, because of a known number each is there with another probability.
    """
    if federation.privacy.unit == "user" and federation.rounds.fraction < 1:
        return {"updates": None, "refused": None, "each_round": None}
    rounds = state.rounds
    reasons = sorted({reason for done in rounds for reason in done.refused})
    return {
        "updates": {"drawn": sum(done.drawn for done in rounds), "good": sum(done.good for done in rounds)},
        "refused": {reason: sum(done.refused.get(reason, 0) for done in rounds) for reason in reasons},
        "each_round": [_shown(done) for done in rounds],
    }


def _began_with(federation: Federation) -> dict[str, Any] | None:
    """Return what the adapter that it began with was taught under: what was spent on the same people adds up."""
    if federation.model.start is None:
        return None
    path = Path(federation.model.start) / MANIFEST
    if not path.is_file():
        return {"privacy": {"unit": "unknown"}, "began_with": None}
    before = read_object(path).get("federation", {})
    return {name: before.get(name) for name in ("settings_sha256", "privacy", "began_with")}


def privacy_of(federation: Federation, state: State) -> dict[str, Any]:
    """Return for whom the result is how private; of nothing that was not counted is anything claimed."""
    privacy = federation.privacy
    budget = budget_of(privacy)
    if budget is None:
        return {"unit": "none"}
    if privacy.unit == "user":
        ledger = Ledger.of(state.ledger)
        return {
            "unit": "user",
            **budget.recorded(ledger),
            "clip": privacy.clip,
            "noise": state.noise,
            "secure_aggregation": federation.aggregation.secure,
        }
    told = [done.epsilon for done in state.rounds if done.epsilon is not None]
    return {
        "unit": "example",
        "declared": {"epsilon": budget.epsilon, "delta": budget.delta},
        # Each client counts for itself, by its own number of examples.
        "spent": {"epsilon": max(told, default=None), "delta": budget.delta},
        "spent_as_told_by": "clients, the largest",
        "accountant": privacy.accountant,
        "clip": privacy.clip,
        "noise": privacy.noise,
    }


def _shown(done: Round) -> dict[str, Any]:
    return {
        "round": done.number,
        "drawn": done.drawn,
        "good": done.good,
        "refused": dict(done.refused),
        "changed": done.changed,
        "weigh_less": done.weighs_less,
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "epsilon": done.epsilon,
    }


def _write(document: dict[str, Any], path: Path) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
