"""What the driver asks of an exporter, of an open artifact and of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.delegation import Delegation
from slm_export.profile import FORMATS, CoreML, DeviceProfile
from slm_export.results import Artifact, Check, Latency, ModelFacts
from slm_export.tokenization.runtime_tokenizers import RuntimeTokenizer
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import Coded, Weight


@dataclass(frozen=True)
class ExportOptions:
    """What an artifact is built for, beside its weights."""

    context: int
    """Decoder: tokens that the KV cache holds. Encoder: longest input."""
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int = 0
    adds_bos: bool = False
    """Whether the tokenizer puts the opening token before a text by itself."""
    chat_template: str | None = None
    tokenizer: Path | None = None
    """The bundle's ``tokenizer/``, for formats whose files carry the tokenizer or name it."""
    coreml: CoreML = field(default_factory=CoreML)
    """How the device profile wants a Core ML package."""
    places: tuple[str, ...] = ()
    """Names of the matrices that adapters may add to while the artifact runs."""
    rank: int = 0
    """The largest of adapters, for formats whose places have one rank."""


@runtime_checkable
class DecoderSession(Protocol):
    """A decoder open in its vendor's runtime; it remembers what it has seen through its KV cache."""

    context: int
    prefill_chunk: int
    """The most tokens that one call takes."""
    stop_ids: tuple[int, ...]
    """Where the file itself says that generation ends."""
    bos_id: int | None
    """The opening token that the file itself names; None: it names none."""
    vocabulary: int | None
    """How many tokens the file says that there are; None: it does not say."""

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens at position ``start``; return float32 (vocabulary,) after the last of them."""

    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself, in its format's own words."""

    def close(self) -> None:
        """Let go of the file and of its memory."""


@runtime_checkable
class AdaptableSession(DecoderSession, Protocol):
    """A decoder with places for adapters; one of them is on, or none."""

    places: frozenset[str]
    """Names of the matrices that adapters may add to."""

    def adapt(self, adapter: Path | None) -> None:
        """Turn an adapter file on, or with None whichever is on off, without loading the model again.

        What the cache holds was read with the adapter of that time: begin again at position 0.

        Raises:
            InputError: it is no adapter file, or not one for this model.
        """

    def adapted(self, adapter: Path, tokens: Sequence[int]) -> Tensor:
        """Return the logits after some tokens, of the runtime's own loader of adapters, whichever is on here."""


@runtime_checkable
class EncoderSession(Protocol):
    """An encoder open in its vendor's runtime."""

    context: int

    def outputs(self, tokens: Sequence[int], mask: Sequence[int], types: Sequence[int] = ()) -> Tensor:
        """Return float32: an embedding (width,), or scores of the shape of the task (see ``tasks``), without batch.

        mask: 1 for a token, 0 for padding. types: 0 for a question and 1 for its passage; needed only there.
        """

    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself."""

    def close(self) -> None:
        """Let go of the file and of its memory."""


Session = DecoderSession | EncoderSession


class Exporter(Protocol):
    """Writes one format, and opens it again in its own runtime."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    """What it is built on, for the record of versions."""
    tables: ClassVar[bool]
    """Whether it holds palettized weights."""
    dense_only: ClassVar[str | None]
    """Why zeros gain nothing in its runtime wherever they lie in a matrix; None where they do."""
    elsewhere: ClassVar[str | None]
    """Why the vendor's runtime cannot be asked on this machine; None where it can. `open` then executes the file by
    its specification: nothing is timed, and no runner of the vendor's writes text."""

    def file(self, task: str) -> str:
        """Return where the artifact is in a bundle: executorch/model.pte."""

    def ready(self) -> None:
        """Raise MissingComponentError unless everything that this exporter needs is installed."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where this checkpoint cannot be written in this format."""

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Write the artifact to ``path``."""

    def open(self, path: Path, task: str) -> Session:
        """Open an artifact in the vendor's runtime."""

    def stored(self, path: Path) -> Mapping[str, Coded]:
        """Return every quantized or palettized matrix under its name in the checkpoint, read from the artifact alone.

        Raises:
            InputError: the file is not one of ours, or a matrix in it is not on the grid.
        """

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Return what can be told of an artifact in this format alone.

        Given   the quantized checkpoint that it was made from, and the ids of some text
        """

    def delegation(self, path: Path) -> Delegation | None:
        """Return what share of an artifact its delegate takes; None where that cannot be told."""

    def rounding(self, x: Tensor, weight: Weight) -> Tensor:
        """Return float32 activations (..., in) as the runtime rounds them before they meet ``weight``."""

    def runner_tokenizer(self, bundle: Path) -> str:
        """Return which file of the bundle the vendor's runner is to be given for a tokenizer.

        Given   a bundle with the source's files in ``tokenizer/``; where the runner cannot read those, the file is
                written here, beside the artifact
        """

    def open_tokenizer(self, path: Path, tokenizer: Path, task: str) -> RuntimeTokenizer | None:
        """Open the tokenizer that the vendor's runner reads text with; None where this format has none.

        Given   path: the artifact; tokenizer: the file that `runner_tokenizer` returned

        Raises:
            TokenizerLoadError: the runtime cannot read it.
        """

    def set_threads(self, count: int) -> None:
        """Let the runtime use ``count`` threads in this process; before anything is opened."""

    def generate(self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
        """Return greedy text of the vendor's own generation loop, as an app would run it."""


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one matrix: ``up @ down``."""

    down: Tensor
    """float32 (rank, in)."""
    up: Tensor
    """float32 (out, rank), the adapter's scale in it."""


@runtime_checkable
class AdapterExporter(Exporter, Protocol):
    """An exporter whose runtime takes adapters as files of their own."""

    adapter_suffix: ClassVar[str]
    no_adapter_runner: ClassVar[str | None]
    """Why the vendor's own generation loop takes no adapter; None where it does."""

    def write_adapter(self, factors: Mapping[str, Factors], base: Path, path: Path) -> None:
        """Write an adapter's file.

        Given   factors: weight -> what is added to it; all of them places of the artifact at ``base``
        """

    def stored_factors(self, path: Path, base: Path) -> Mapping[str, Factors]:
        """Return what an adapter's file adds to each weight, read from that file alone.

        Raises:
            InputError: it is no adapter file, or not one for the artifact at ``base``.
        """

    def generate_adapted(
        self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int, adapter: Path
    ) -> str:
        """Return greedy text of the vendor's own generation loop with an adapter on."""


@dataclass(frozen=True)
class Proven:
    """What a bundle holds once its artifacts have passed every gate, for a target that wraps them for an app."""

    model: ModelFacts
    artifacts: tuple[Artifact, ...]
    """As they were asked for, with absolute paths."""
    profile: DeviceProfile
    tokenizer: SourceTokenizer
    runtime: Mapping[str, Any]
    """As the manifest has it."""


class Target(Protocol):
    """Where artifacts go: what its app needs on disk, and how speed is measured there."""

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = FORMATS
    """The formats that its apps can be given."""

    def ready(self) -> None:
        """Raise MissingComponentError unless everything that this target needs is installed."""

    def bundle(self, tokenizer: SourceTokenizer, folder: Path) -> None:
        """Put what an app on this target needs where artifacts will be: the tokenizer's files."""

    def finish(self, made: Proven, folder: Path) -> tuple[str, ...]:
        """Put beside proven artifacts what the build of an app needs; return what people should be told of it."""

    def benchmark(self, path: Path, format: str, task: str) -> Latency:
        """Measure an artifact as near to this target as this machine can."""
