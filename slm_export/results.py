"""What an export found out: plain frozen values that the manifest, the report and the terminal share.

A figure that was not measured is None, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_export.bundles.checksums import sha256_file, size_of
from slm_export.delegation import Delegation
from slm_export.reports.details import Divergence, FrontierPoint, Furthest, Prediction, WeightRow


@dataclass(frozen=True)
class Signature:
    """One callable method of an artifact. Shapes use names for dynamic sizes: ("1", "tokens")."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file (or package folder) that an exporter wrote; ``path`` is absolute until it is bundled."""

    path: Path
    format: str
    bytes: int
    sha256: str
    bits_per_weight: float | None
    signatures: tuple[Signature, ...] = ()
    data: tuple[Path, ...] = ()
    """Files beside ``path`` that belong to it, counted in ``bytes``; ``sha256`` is of ``path`` alone."""


def written(
    path: Path,
    format: str,
    parameters: int,
    signatures: tuple[Signature, ...],
    data: tuple[Path, ...] = (),
) -> Artifact:
    """Return a finished artifact: its size, with data beside it, and its hash."""
    size = sum(map(size_of, (path, *data)))
    return Artifact(path, format, size, sha256_file(path), 8 * size / parameters, signatures, data)


@dataclass(frozen=True)
class CalibrationFacts:
    """The text that passes were calibrated on."""

    origin: str
    tokens: int
    sha256: str
    """Of the token ids."""


@dataclass(frozen=True)
class PassRow:
    """What one pass did. ``skipped`` gives a reason for every weight that it left alone."""

    name: str
    options: dict[str, object]
    seconds: float
    bytes_before: int
    bytes_after: int
    changed: int
    skipped: dict[str, str]
    error: float | None = None
    """Relative squared error over the changed weights: sum |w - w'|^2 / sum |w|^2."""


@dataclass(frozen=True)
class TokenQuality:
    """A decoder artifact against its source on held-out text (KL in nats; ratio of perplexities)."""

    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
    tokens: int = 0
    quantization_kl_mean: float | None = None
    lowering_kl_mean: float | None = None
    lowering_max_abs: float | None = None
    prompt_kl_max: float | None = None
    """From torch with the artifact's weights and rounding to the artifact, behind the worst of some prompts."""
    greedy_tokens: int = 0
    greedy_agreement: float | None = None
    greedy_first_difference: int | None = None
    greedy_text: str | None = None
    same_tokens: float | None = None
    """Of an artifact with fewer tokens than the source: share of the source's tokens of the text that it reads as they
    are; it spells the others."""
    lacking_mass: float | None = None
    """Mean probability that the source gives, along the text, to tokens that the artifact lacks."""
    tokens_ratio: float | None = None
    """Tokens that the artifact reads the text in, for each of the source's."""
    examples: tuple[Divergence, ...] = ()
    """The places of the largest divergence, and the first differences of the artifact's own texts."""


@dataclass(frozen=True)
class EmbeddingQuality:
    """An embedding artifact against its source over varied sentences."""

    cosine_min: float | None = None
    cosine_mean: float | None = None
    sentences: int = 0
    worst_sentence: str | None = None
    lowering_max_abs: float | None = None
    examples: tuple[Furthest, ...] = ()
    """The furthest texts, the worst first."""


@dataclass(frozen=True)
class ScoreQuality:
    """A classifier artifact against its source over varied sentences."""

    agreement: float | None = None
    max_abs: float | None = None
    sentences: int = 0
    lowering_max_abs: float | None = None
    examples: tuple[Furthest, ...] = ()
    """The furthest texts, the worst first."""


Quality = TokenQuality | EmbeddingQuality | ScoreQuality


@dataclass(frozen=True)
class Check:
    """One judgement of the gate. ``detail`` says where the two sides part, in words a person can act on."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class TokenLatency:
    """Median figures of a decoder, measured in a child process."""

    where: str
    threads: int
    runs: int
    prefill_tokens: int
    load_ms: float | None = None
    time_to_first_token_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_rss_mb: float | None = None
    """Peak resident memory of the whole process, the Python interpreter and libraries included, MiB."""
    model_rss_mb: float | None = None
    """Peak resident memory above what the process held before the artifact was loaded, MiB."""


@dataclass(frozen=True)
class EncoderLatency:
    """Percentiles of one call of an encoder (milliseconds) at ``tokens`` tokens, batch 1."""

    where: str
    threads: int
    runs: int
    tokens: int
    load_ms: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    """p50, p90, p99."""
    peak_rss_mb: float | None = None
    model_rss_mb: float | None = None


Latency = TokenLatency | EncoderLatency


@dataclass(frozen=True)
class AdapterResult:
    """A low-rank adapter beside an artifact; ``path`` is absolute until it is bundled."""

    name: str
    path: Path
    bytes: int
    sha256: str
    base_sha256: str
    """Of the artifact that it is for, and for no other."""
    source_sha256: str
    """Of the adapter as it came: configuration and weights."""
    rank: int
    """The largest."""
    parameters: int
    targets: tuple[str, ...]
    """Layers that it adds to, by the last part of their names."""
    quality: TokenQuality | None
    """With it on, against the source with it on; None where that was turned off."""


@dataclass(frozen=True)
class FormatResult:
    """Everything known of one artifact. ``quality`` and ``latency`` are None where they were turned off."""

    artifact: Artifact
    quality: Quality | None
    checks: tuple[Check, ...]
    latency: Latency | None
    delegation: Delegation | None = None
    prediction: Prediction | None = None
    """For the machine that measured; None where its model does not know enough."""
    on_device: Prediction | None = None
    """For the device that it was made for, where it was not measured."""
    adapters: tuple[AdapterResult, ...] = ()
    """Those that can be turned on; their checks are among those of the artifact, behind their names."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """What was predicted, machine by machine."""
        return tuple(one for one in (self.prediction, self.on_device) if one is not None)


@dataclass(frozen=True)
class Pair:
    """Two formats of one export beside each other, on the same tokens or sentences."""

    formats: tuple[str, str]
    matrices: int
    """Quantized matrices, read back out of both files."""
    differing: tuple[str, ...]
    """Those whose bits, group, codes or scales are not the same."""
    rows: int
    """Rows of outputs compared: tokens, or sentences."""
    max_abs: float
    top1_agreement: float | None = None
    kl_mean: float | None = None
    """From the first format's distribution to the second's, in nats."""
    cosine_min: float | None = None
    cosine_mean: float | None = None
    greedy_agreed: int | None = None
    """Tokens that both write alike before they part."""
    greedy_tokens: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What was compiled. ``task`` is text-generation, sentence-embedding, text-classification, ..."""

    name: str
    architecture: str
    task: str
    parameters: int
    source_sha256: str
    source_bytes: int
    licence: str | None = None
    """Its name, as the model's card says it."""
    context: int | None = None
    licence_texts: tuple[str, ...] = ()
    """Files of the bundle."""
    learned: dict[str, Any] | None = None
    """How slm-export taught it, where it did: `source.learned.Learned` as JSON values."""
    adapter: dict[str, Any] | None = None
    """What was merged into which base, where MODEL was an adapter: `source.adapters.MergedFrom` as JSON values."""


@dataclass(frozen=True)
class Report:
    """The whole outcome of one export."""

    model: ModelFacts
    target: str
    device: str
    device_title: str
    passes: tuple[PassRow, ...]
    formats: tuple[FormatResult, ...]
    toolchain: dict[str, str]
    seconds: float
    stages: dict[str, float]
    """Wall seconds by stage, in order."""
    peak_rss_mb: float
    """Peak resident memory of the export itself, MiB."""
    parity: tuple[Pair, ...] = ()
    """Every pair of formats."""
    calibration: CalibrationFacts | None = None
    """The text that passes were calibrated on; None where none was."""
    notes: tuple[str, ...] = ()
    """What was not done, and why: verification turned off, a check that does not apply, a fallback."""
    asked: dict[str, object] = field(default_factory=dict)
    """What the user asked for, under the names of slm-export.toml; the rest is the device profile's."""
    weights: tuple[WeightRow, ...] = ()
    """Every weight, in the order of the model."""
    frontier: tuple[FrontierPoint, ...] = ()
    """Size against quality over several recipes, where they were searched."""
    environment: dict[str, str] = field(default_factory=dict)
    """The machine that exported and measured: processor, cores, memory, system."""
    held_out: str | None = None
    """sha256 of the text that fidelity was measured on."""

    @property
    def passed(self) -> bool:
        """Whether every check of every format passed."""
        return all(result.passed for result in self.formats) and not any(p.differing for p in self.parity)
