"""The models that faults are planted in, and what the gate says of an artifact of them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fault import Fault
from models import save

from slm_export import judge
from slm_export.checkpoint import Checkpoint
from slm_export.errors import SlmExportError
from slm_export.evaltext import load_documents
from slm_export.exporters import litert_lowering
from slm_export.fidelity import References, default_gates, exactness, tokens
from slm_export.fidelity.steps import judge_steps
from slm_export.judge import Subject, judge_artifact, self_check
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.parity import judge_codes, quantized_weights
from slm_export.progress import Progress
from slm_export.registry import exporter, target
from slm_export.reports.by_weight import changes_of
from slm_export.results import Artifact, Check
from slm_export.runtime import DecoderSession, Exporter, ExportOptions, Session
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

CONTEXT = 512
_OF_GRAPHS = ("rotary embedding", "attention", "norm", "activation", "KV cache")
_OF_ITSELF = ("tokenizer", "stop tokens", "metadata")
TOKENS = 1024
"""Of held-out text: a quarter of what an export is judged on, so that a hundred exports end within the hour."""


@dataclass(frozen=True)
class Caught:
    """What the gate says of one artifact."""

    failed: tuple[Check, ...]
    """Checks that did not pass."""
    refused: str = ""
    """Why there was nothing to check: the artifact could not be written, opened or run."""

    @property
    def by(self) -> str:
        """The names of what raised the alarm; nothing, where nothing did."""
        return "refused" if self.refused else ", ".join(check.name for check in self.failed)


@dataclass(frozen=True)
class Planted:
    """A fault with the references that its gate holds the artifact against."""

    source: Checkpoint
    quantized: Checkpoint
    tokenizer: SourceTokenizer
    folder: Path

    @functools.cached_property
    def references(self) -> References:
        """What source and quantized model say of the text, kept for the next artifact."""
        self.folder.mkdir(parents=True)
        steps = changes_of(self.source, self.quantized).steps
        return References(self.source, self.quantized, steps, self.folder)


GOOD = Fault("none", "none")
"""What no alarm may be raised at."""


class Workshop:
    """Models made once, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Planted] = {}

    def gate(self, fault: Fault, format: str) -> Caught:
        """Write a model with a fault, and ask the default gate."""
        try:
            return self._judged(fault, format)
        except SlmExportError as error:
            return Caught((), str(error))

    def _judged(self, fault: Fault, format: str) -> Caught:
        planted = self._planted(fault)
        task, made = planted.source.task, exporter(format)
        made.ready()
        faulty: Any = _Faulty(made, fault)
        # The gate asks all its questions; here the first alarm is enough.
        gates = default_gates(task, fault.bits)
        if first := _failed(judge_steps(planted.references.steps, gates)):
            return Caught(first)
        if fault.kind in _OF_GRAPHS and made.elsewhere is None:
            # Where it is costs several exports, and has a test of its own.
            with patch.object(exactness, "located", lambda *_: "not asked"):
                exact = exactness.judge_exact(faulty, planted.quantized, planted.source.folder)
            if not exact.passed:
                return Caught((exact,))
        work = self._written(fault, planted, made)
        path, runner = work / made.file(task), work / made.runner_tokenizer(work)
        codes = judge_codes(made.stored(path), quantized_weights(planted.quantized))
        if not codes.passed:
            return Caught((codes,))
        if fault.kind in _OF_GRAPHS and made.elsewhere is not None:
            sample = planted.tokenizer.encode_with_template(_documents()[0])
            if own := _failed(made.own_checks(path, planted.quantized, sample)):
                return Caught(own)
        subject = Subject(
            faulty,
            path,
            task,
            planted.tokenizer,
            runner,
            _documents(),
            gates,
            CONTEXT,
        )
        if fault.kind in _OF_ITSELF and (said := _failed(self_check(subject).checks)):
            return Caught(said)
        with patch.object(tokens, "TOKENS", TOKENS), patch.object(judge, "TOKENS", TOKENS):
            judged = judge_artifact(subject, planted.references, Progress(silent=True))
        return Caught(_failed(judged.checks))

    def _written(self, fault: Fault, planted: Planted, made: Exporter) -> Path:
        """Return a bundle with the artifact; one that has no fault before it is written is written once."""
        plain = replace(GOOD, model=fault.model, bits=fault.bits)
        later = replace(plain, session=fault.session, file=fault.file)
        good = replace(later, name=fault.name, kind=fault.kind, formats=fault.formats) == fault
        work = self._folder / (f"good-{fault.model}-{fault.bits}-{made.name}" if good else "bundle")
        path = work / made.file(planted.source.task)
        if not (good and work.exists()):
            shutil.rmtree(work, ignore_errors=True)
            target("android").bundle(planted.tokenizer, work)
            fault.tokenizer(work / "tokenizer")
            path.parent.mkdir(parents=True, exist_ok=True)
            made.runner_tokenizer(work)
            with self._lowered_once(fault, planted):
                _Faulty(made, fault).write(planted.quantized, self._options(planted, work), path)
        if fault.file is Fault.file:
            return work
        spoilt = self._folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(work, spoilt)
        fault.file(spoilt / made.file(planted.source.task))
        return spoilt

    @contextmanager
    def _lowered_once(self, fault: Fault, planted: Planted) -> Iterator[None]:
        """Keep LiteRT's graph where a fault lies in what is packed beside it: lowering takes most of the time."""
        if fault.written is not Fault.written or fault.writing is not Fault.writing:
            yield
            return
        lower = litert_lowering.lower_decoder

        def kept(checkpoint: Checkpoint, context: int, lengths: list[int], path: Path) -> None:
            before = self._folder / f"lowered-{planted.folder.name}-{context}.tflite"
            if not before.exists():
                lower(checkpoint, context, lengths, before)
            shutil.copyfile(before, path)

        with patch.object(litert_lowering, "lower_decoder", kept):
            yield

    def _options(self, planted: Planted, work: Path) -> ExportOptions:
        tokenizer = planted.tokenizer
        return ExportOptions(
            context=CONTEXT,
            stop_ids=tokenizer.stop_ids,
            bos_id=tokenizer.bos_id,
            pad_id=tokenizer.pad_id,
            adds_bos=tokenizer.adds_bos,
            chat_template=tokenizer.chat_template,
            tokenizer=work / "tokenizer",
        )

    def _planted(self, fault: Fault) -> Planted:
        spoilt = fault.name if fault.made is not Fault.made else ""
        key = f"{fault.model}-{fault.bits}-{spoilt}"
        if key not in self._made:
            source = load_checkpoint(self._model(fault.model))
            recipe = GroupQuantize(bits=fault.bits, group=32, embedding_bits=8)
            quantized = fault.made(recipe.run(source).checkpoint)
            tokenizer = SourceTokenizer.load(source.folder)
            kept = self._folder / f"kept-{len(self._made)}"
            self._made[key] = Planted(source, quantized, tokenizer, kept)
        return self._made[key]

    def _model(self, name: str) -> Path:
        folder = self._folder / name.replace(" ", "-")
        if not folder.exists():
            save(name, folder)
        return folder


class _Faulty:
    """An exporter with a fault: whatever it writes, and whatever it opens, has it."""

    def __init__(self, made: Exporter, fault: Fault) -> None:
        self._made, self._fault = made, fault

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Write the artifact."""
        with self._fault.writing():
            return self._made.write(self._fault.written(checkpoint), self._fault.options(options), path)

    def open(self, path: Path, task: str) -> Session:
        """Open the artifact."""
        session = self._made.open(path, task)
        assert isinstance(session, DecoderSession)
        return self._fault.session(session)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


def _failed(checks: Sequence[Check]) -> tuple[Check, ...]:
    return tuple(check for check in checks if not check.passed)


@functools.lru_cache
def _documents() -> Sequence[str]:
    return load_documents(None)
