"""What a smaller vocabulary costs: likelihood of a domain's text, tokens it takes, text that no longer reads back.

    python benchmarks/quality/vocabulary.py MODEL [--keep 0.25 0.5] [--domain NAME ...] [--strings 10000]

Domains are files of installed packages. Those that the model's ``heldout.tsv`` kept out of its training are what is
judged, the others are what the vocabulary is chosen by; an encoder is judged on descriptions of installed packages,
every second one. Weights stay as they are: nothing is quantized, so what is measured is the vocabulary alone.

    ratio        of perplexities: likelihood of the whole text, each model in its own tokens, over the source's tokens
    tokens       of the trimmed model for each of the source's, on the judged text
    lacking      mean probability that the source gives to tokens that are gone
    back         strings of all scripts, symbols and controls that read back as the source's tokenizer reads them back

Standard errors are over windows (for the ratio, of its logarithm), for encoders over texts.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import torch
from heldout import calibration_documents, heldout_documents
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.fidelity import References
from slm_export.fidelity.vocabularies import Vocabularies, Window
from slm_export.graph.model import build_reference
from slm_export.optimizers.trim_vocabulary import TrimVocabulary
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import tokenizer_of

WINDOW, TOKENS, TEXTS = 256, 8192, 300
DOMAINS = {
    "polynomial tests": ("numpy", "numpy/polynomial/tests", "test_*.py"),
    "attention patterns": ("torch", "torch/_inductor/fx_passes/serialized_patterns", "*.py"),
    "package initialisation": ("transformers", "transformers/models", "*/__init__.py"),
    "operator definitions": ("onnxscript", "onnxscript/onnx_opset/_impl", "opset*.py"),
    "operator tests": ("executorch", "executorch/backends/arm/test/ops", "test_*.py"),
}
"""Distribution, folder in it, files."""
WIDE = "any Python"


@dataclass(frozen=True)
class Domain:
    """Text to choose a vocabulary by, and other text of the kind to judge it on."""

    chosen_by: tuple[str, ...]
    judged_on: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What was measured of one domain and size."""

    kept: int
    megabytes: float
    quality: str
    tokens: float
    lacking: float | None
    back: str


def code_domain(model: Path, name: str) -> Domain:
    """Return a domain of Python files; nothing that is judged on was trained on."""
    if name == WIDE:
        return Domain(calibration_documents(), heldout_documents(model))
    package, folder, pattern = DOMAINS[name]
    root = Path(str(distribution(package).locate_file(".")))
    with (model / "heldout.tsv").open(encoding="utf-8", newline="") as file:
        held_out = {root / row["path"] for row in csv.DictReader(file, delimiter="\t")}
    files = sorted((root / folder).glob(pattern))
    texts = {file: file.read_text("utf-8") for file in files}
    return Domain(
        tuple(text for file, text in texts.items() if file not in held_out and text.strip()),
        tuple(text for file, text in texts.items() if file in held_out),
    )


def description_domain() -> Domain:
    """Return the descriptions of the packages that are installed here."""
    found = {one.metadata["Name"]: str(one.metadata.get_payload() or "") for one in distributions()}
    texts = [text for _, text in sorted(found.items()) if len(text) > 1000]
    return Domain(tuple(texts[::2]), tuple(texts[1::2]))


def strings(count: int) -> Iterable[str]:
    """Yield strings of every plane of Unicode, surrogates left out: they are no text."""
    rng = random.Random(7)
    blocks = ((0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x2000), (0x2000, 0x3040))
    blocks += ((0x3040, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000))
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(0, 6)):
            low, high = rng.choice(blocks)
            parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8))))
        yield rng.choice(("", " ", "\n")).join(parts)


def read_back(both: Vocabularies, count: int) -> str:
    """Return how many strings read back as before."""
    same = sum(
        both.artifact.decode(both.artifact.encode(text)) == both.source.decode(both.source.encode(text))
        for text in strings(count)
    )
    return f"{same:,} of {count:,}"


@torch.no_grad()
def likelihood(
    source: nn.Module, made: nn.Module, both: Vocabularies, texts: Sequence[str]
) -> tuple[str, float, float]:
    """Return ratio of perplexities, tokens per token and lacking mass."""
    passages = both.passages(texts, WINDOW, TOKENS)
    increase, count, lacking = [], [], []
    for one in passages:
        (theirs, ours), logs = one.places[0], _logs(source, one.source)
        increase.append(_nll(_logs(made, one.artifact), one.artifact, ours) - _nll(logs, one.source, theirs))
        count.append(len(one.source) - theirs)
        lacking.append(both.lacking(logs).mean())
    each, of = torch.stack(increase), torch.tensor(count)
    mean = each.sum() / of.sum()
    error = (each - mean * of).std() / len(of) ** 0.5 / of.float().mean()
    tokens = sum(len(one.artifact) for one in passages) / sum(len(one.source) for one in passages)
    return f"{mean.exp():.4f} (ln {mean:+.4f} ± {error:.4f})", tokens, float(torch.stack(lacking).mean())


@torch.no_grad()
def cosines(
    source: nn.Module, made: nn.Module, both: Vocabularies, texts: Sequence[str]
) -> tuple[str, float, None]:
    """Return cosines of embeddings, tokens per token; an encoder says nothing of next tokens."""
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part.split()) > 5]
    step = max(1, len(paragraphs) // TEXTS)
    found, counts = [], [0, 0]
    for text in paragraphs[::step][:TEXTS]:
        ids = [one.encode_with_template(text)[:WINDOW] for one in (both.source, both.artifact)]
        if max(map(len, ids)) == WINDOW:  # cut at different places, it would be two texts
            continue
        counts = [count + len(one) for count, one in zip(counts, ids, strict=True)]
        vectors = [
            model(torch.tensor([one]), torch.ones(1, len(one), dtype=torch.int64))[0]
            for model, one in zip((source, made), ids, strict=True)
        ]
        found.append(torch.cosine_similarity(*vectors, dim=-1))
    values = torch.stack(found)
    error = values.std() / len(values) ** 0.5
    figures = f"cosine {values.mean():.4f} ± {error:.4f}, smallest {values.min():.4f}, {len(values)} texts"
    return figures, counts[1] / counts[0], None


def measured(source: Checkpoint, domain: Domain, keep: float, count: int) -> Row:
    """Trim for a domain, and compare."""
    work = Workbench(calibration=Calibration((), "the domain", domain.chosen_by))
    made = TrimVocabulary(keep=keep).run(source, work).checkpoint
    assert made.vocabulary is not None
    both = References(source, made).vocabularies(tokenizer_of(made))
    compare = likelihood if source.task == GENERATION else cosines
    figures = compare(build_reference(source), build_reference(made), both, domain.judged_on)
    return Row(len(made.vocabulary.tokens), made.bytes / 1e6, *figures, read_back(both, count))


def _logs(model: nn.Module, window: Window) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([window])).logits
    return logits[0].float().log_softmax(-1)


def _nll(logs: Tensor, window: Window, start: int) -> Tensor:
    following = torch.tensor(window[start:]).unsqueeze(1)
    return -logs[start - 1 : -1].gather(1, following).sum()


def main() -> None:
    """Print a row per domain and size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--domain", nargs="+", choices=(*DOMAINS, WIDE))
    parser.add_argument("--strings", type=int, default=10_000)
    arguments = parser.parse_args()
    source = load_checkpoint(arguments.model)
    names: Sequence[str] = arguments.domain or (*DOMAINS, WIDE)
    if source.task != GENERATION:
        names = ("package descriptions",)
    table = Table(
        "domain",
        "keep",
        "MB",
        "perplexity ratio" if source.task == GENERATION else "embeddings",
        "tokens",
        "lacking",
        "back",
    )
    table.add_row("(whole)", "", f"{source.bytes / 1e6:.2f}", "", "", "", "")
    for name in names:
        try:
            domain = description_domain() if source.task != GENERATION else code_domain(arguments.model, name)
        except PackageNotFoundError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for keep in arguments.keep:
            row = measured(source, domain, keep, arguments.strings)
            table.add_row(
                name,
                f"{row.kept:,}",
                f"{row.megabytes:.2f}",
                row.quality,
                f"{row.tokens:.3f}",
                "" if row.lacking is None else f"{row.lacking:.3f}",
                row.back,
            )
    Console(width=140).print(f"{source.name}: float weights", table, sep="\n")


if __name__ == "__main__":
    main()
