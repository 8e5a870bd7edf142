"""How a model was taught, and what its artifacts make of that: the rows of one table."""

from __future__ import annotations

from typing import Any

from slm_export.reports.words import figure
from slm_export.results import EmbeddingQuality, FormatResult, Report, ScoreQuality, TokenQuality


def taught_rows(report: Report) -> list[tuple[str, ...]]:
    """Return teacher, child before, child after and every artifact, a header first; nothing of a model of others."""
    learned = report.model.learned
    if learned is None:
        return []
    names = list(dict.fromkeys(name for row in learned["rows"] for name in row["figures"]))
    made: list[tuple[str, ...]] = [("", "parameters", *(name.replace("_", " ") for name in names))]
    for row in learned["rows"]:
        cells = (_interval(row["figures"].get(name)) for name in names)
        made.append((row["name"], f"{row['parameters']:,}" if row["parameters"] else "", *cells))
    for result in report.formats:
        cells = ("" if name != "perplexity" else _perplexity(result) for name in names)
        made.append((f"artifact, {result.artifact.format}", "", *cells))
    return made


def taught_notes(report: Report) -> list[str]:
    """Return what the table does not say: on which text artifacts were measured, and how far from the child."""
    learned = report.model.learned
    if learned is None:
        return []
    same = report.held_out is not None and report.held_out == learned["held_out"].get("export_sha256")
    where = "of the same held-out text" if same else "of other text than the models above"
    notes = []
    for result in report.formats:
        quality, name = result.quality, result.artifact.format
        if isinstance(quality, TokenQuality) and quality.source_perplexity is not None:
            notes.append(
                f"{name}: on {quality.tokens:,} tokens {where}; the child after has a perplexity of "
                f"{figure(quality.source_perplexity)} there"
            )
        elif isinstance(quality, EmbeddingQuality):
            notes.append(f"{name}: mean cosine {figure(quality.cosine_mean)} to the child after, {where}")
        elif isinstance(quality, ScoreQuality):
            notes.append(f"{name}: agreement {figure(quality.agreement)} with the child after, {where}")
    if learned["by"] == "federate":
        notes.append(_federated(learned["settings"]))
    if learned.get("data_licence"):
        notes.append(f"licence of the text that it learned from: {learned['data_licence']}")
    return notes


def _federated(told: dict[str, Any]) -> str:
    note = (
        f"taught by {told['clients']} clients in {told['rounds']['that_changed']} rounds, on texts that stayed with "
        f"them; {_private(told['privacy'])}"
    )
    before = told.get("began_with")
    while before is not None:
        note += f"; it began with one of an earlier federation: {_private(before['privacy'])}"
        before = before.get("began_with")
    return note


def _private(privacy: dict[str, Any]) -> str:
    if privacy["unit"] not in ("user", "example"):
        return "no differential privacy" if privacy["unit"] == "none" else "nothing is known of its privacy"
    spent, declared = privacy["spent"], privacy["declared"]
    epsilon = "unknown" if spent["epsilon"] is None else figure(spent["epsilon"])
    return (
        f"{privacy['unit']}-level differential privacy: epsilon {epsilon}, of a budget of "
        f"{figure(declared['epsilon'])}, at delta {declared['delta']:g} (accountant: {privacy['accountant']})"
    )


def _perplexity(result: FormatResult) -> str:
    quality = result.quality
    return figure(quality.perplexity) if isinstance(quality, TokenQuality) else ""


def _interval(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    return f"{figure(measured['value'])} ({figure(measured['low'])} to {figure(measured['high'])})"
