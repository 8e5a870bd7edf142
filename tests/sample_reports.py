"""Finished exports, small and made up, for tests of the bundle and its documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from slm_export.bundles.bundle import sha256_file, size_of, staged, write_documents
from slm_export.delegation import Delegation
from slm_export.gates import Gates
from slm_export.reports.details import Divergence, FrontierPoint, PredictedPhase, Prediction, WeightRow
from slm_export.results import (
    Artifact,
    Check,
    EmbeddingQuality,
    EncoderLatency,
    FormatResult,
    Latency,
    ModelFacts,
    Pair,
    PassRow,
    Quality,
    Report,
    Signature,
    TokenLatency,
    TokenQuality,
)

SHA = "ab" * 32
GATES = Gates.model_validate({"max_kl_mean": 0.05})
RUNTIME = {"task": "text-generation", "context": 512, "bos_id": 1, "stop_ids": [2, 3]}


def fill(folder: Path) -> Path:
    """Write what an exporter would: an artifact and a tokenizer; return the artifact."""
    artifact = folder / "executorch" / "model.pte"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(bytes(range(256)) * 16)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    return artifact


def artifact_of(path: Path, format: str = "executorch") -> Artifact:
    signature = Signature("forward", {"tokens": "int64[1, tokens]"}, {"logits": "float32[1, 1, 512]"})
    return Artifact(path, format, size_of(path), sha256_file(path), 5.25, (signature,))


def report_of(
    artifact: Artifact,
    *,
    name: str = "tiny",
    task: str = "text-generation",
    quality: Quality | None,
    latency: Latency | None,
    checks: tuple[Check, ...],
) -> Report:
    return Report(
        model=ModelFacts(name, "LlamaForCausalLM", task, 5_500_000, SHA, 22_000_000, "apache-2.0", 512),
        target="android",
        device="oneplus-12",
        device_title="OnePlus 12",
        passes=(
            PassRow(
                name="group-quantize",
                options={"bits": 4, "group": 32},
                seconds=1.25,
                bytes_before=22_000_000,
                bytes_after=3_600_000,
                changed=42,
                skipped={
                    "layers.0.norm": "a vector",
                    "layers.1.norm": "a vector",
                    "head": "30 columns do not divide by group 32",
                    "tail": "34 columns do not divide by group 32",
                },
                error=0.004,
            ),
        ),
        formats=(FormatResult(artifact, quality, checks, latency),),
        toolchain={"torch": "2.13.0+cpu", "executorch": "1.4.1", "python": "3.11.7"},
        seconds=75.0,
        stages={"load": 1.0, "lower to ExecuTorch": 60.0},
        peak_rss_mb=1234.5,
        notes=("benchmark ran on this machine, not on the phone",),
    )


def decoder_report(artifact: Artifact, name: str = "tiny", kl_mean: float = 0.031) -> Report:
    return report_of(
        artifact,
        name=name,
        quality=TokenQuality(
            kl_mean=kl_mean,
            kl_p99=0.2,
            kl_max=1.5,
            top1_agreement=0.94,
            perplexity_ratio=1.02,
            tokens=2048,
            lowering_kl_mean=1e-5,
            lowering_max_abs=0.01,
            greedy_tokens=64,
            greedy_agreement=0.97,
            greedy_text="def f(x):\n    return x",
        ),
        latency=TokenLatency("host CPU", 2, 5, 128, 30.5, 55.0, 1800.0, 400.0, 512.0, 40.0),
        checks=(
            Check("kl_mean", kl_mean <= 0.05, "the mean KL over 2,048 tokens", kl_mean, 0.05),
            Check("top1_agreement", True, "of the likeliest tokens", 0.94, 0.9),
            Check("tokenizer", True, "120 texts give the same ids"),
        ),
    )


def encoder_report(artifact: Artifact) -> Report:
    return report_of(
        artifact,
        name="mini-encoder",
        task="sentence-embedding",
        quality=EmbeddingQuality(0.97, 0.995, 200, "a very odd sentence", 2e-6),
        latency=EncoderLatency("host CPU", 2, 30, 64, 12.0, {"p50": 14.1, "p90": 15.2, "p99": 19.9}, 200.0),
        checks=(Check("cosine_mean", True, "over 200 sentences", 0.995, 0.98),),
    )


def full_report(artifact: Artifact, *, second: Artifact) -> Report:
    """Return a report with everything that a page can show: two formats, prediction, roofline, frontier."""
    report = decoder_report(artifact)
    (one,) = report.formats
    assert isinstance(one.quality, TokenQuality)
    assert isinstance(one.latency, TokenLatency)
    one = dataclasses.replace(
        one,
        quality=dataclasses.replace(one.quality, examples=EXAMPLES),
        delegation=Delegation("XNNPACK", "decode", 320, 301, 10**7, 10**7, {"CAST": 1, "RESHAPE": 3}),
        prediction=Prediction(
            "OnePlus 12",
            6e10,
            4e11,
            (
                PredictedPhase("decode", 1.1e7, 6e6, 1e-4, 2.5e-3),
                PredictedPhase("prefill of 128 tokens", 1.4e9, 6.5e6, 3.5e-3, 7.1e-2),
            ),
            "bandwidth from the device profile, operations measured",
        ),
    )
    other = dataclasses.replace(one, artifact=second, prediction=None, delegation=None)
    return dataclasses.replace(
        report,
        formats=(one, other),
        parity=(Pair(("executorch", "onnx"), 43, (), 128, 0.23, 0.99, 2.6e-4, None, None, 11, 48),),
        asked={"bits": 4, "formats": ["executorch", "onnx"], "gates": {"max_kl_mean": 0.05}},
        weights=weight_rows(),
        frontier=FRONTIER,
        environment={"processor": "Some CPU", "cores": "2", "memory": "8.0 GiB"},
        held_out=SHA,
    )


EXAMPLES = (
    Divergence("held-out text", "def area(r):\n    return", " 3", 0.61, " math", 0.55, 1.25, " 3.14 * r"),
    Divergence("the artifact's own text", "for item in", " items", 0.5, " range", 0.45, None, "(10):"),
)
FRONTIER = (
    FrontierPoint("4 bits throughout", 3_100_000, 1.031, 1.034),
    FrontierPoint("5.0 bits", 3_600_000, 1.012, 1.013, chosen=True),
    FrontierPoint("6.1 bits", 4_400_000, 1.006),
    FrontierPoint("8 bits throughout", 5_900_000, 1.002, 1.003),
)


def weight_rows(layers: int = 8) -> tuple[WeightRow, ...]:
    """Return the weights of a small Llama."""
    shapes = {
        "self_attn.q_proj": (65_536, 4),
        "self_attn.k_proj": (32_768, 8),
        "mlp.up_proj": (180_000, 4),
        "mlp.down_proj": (180_000, 4),
        "input_layernorm": (256, 32),
    }
    rows = [
        WeightRow(
            "model.embed_tokens.weight",
            "embedding",
            None,
            "model.embed_tokens",
            1_048_576,
            8,
            1_050_000,
            5e-5,
        )
    ]
    for layer in range(layers):
        for at, (part, (values, bits)) in enumerate(shapes.items()):
            error = None if bits == 32 else 0.004 * (1 + 0.3 * layer) / (1 + at)
            role = "other" if bits == 32 else "linear"
            name = f"model.layers.{layer}.{part}.weight"
            rows.append(WeightRow(name, role, layer, part, values, bits, values * bits // 8, error))
    return (*rows, WeightRow("model.norm.weight", "other", None, "model.norm", 256, 32, 1024))


def unverified(report: Report) -> Report:
    formats = tuple(
        dataclasses.replace(result, quality=None, latency=None, checks=()) for result in report.formats
    )
    return dataclasses.replace(report, formats=formats)


def make(out: Path, force: bool = False, text: str = "") -> Path:
    """Write a whole bundle, as an export does; ``text`` tells two of them apart."""
    with staged(out, force) as staging:
        report = decoder_report(artifact_of(fill(staging.path)))
        (staging.path / "tokenizer" / "note.txt").write_text(text)
        write_documents(staging.path, report, gates=GATES, runtime=RUNTIME)
        return staging.commit()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
