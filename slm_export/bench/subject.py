"""What is measured: an artifact of a bundle, or a file that any tool made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.bundles.checksums import size_of
from slm_export.bundles.manifest import MANIFEST, Manifest
from slm_export.errors import GateError, InputError
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.tokenization.tokenizer import OWN_TOKENIZER

GENAI_CONFIG = "genai_config.json"
_FORMATS = {
    ".pte": "executorch",
    ".litertlm": "litert",
    ".tflite": "litert",
    ".onnx": "onnx",
    ".mlpackage": "coreml",
    ".gguf": "gguf",
}


@dataclass(frozen=True)
class Subject:
    """One artifact. ``tokenizer`` is what a vendor's runner is given; a file of another tool has none here."""

    name: str
    path: Path
    format: str
    task: str
    bytes: int
    tokenizer: Path | None = None
    context: int | None = None
    """As the bundle says; a file is asked once it is open."""
    functions: tuple[str, ...] = ()
    """Names of its entry points, as the bundle says."""

    @property
    def generates(self) -> bool:
        """Whether it is a decoder."""
        return self.task == GENERATION


def find_subject(given: Path, format: str | None = None) -> Subject:
    """Return the artifact of a bundle (its first, or that of a format), or a file by its suffix.

    Raises:
        InputError: there is no such thing, or it is none that can be measured.
        GateError: the artifact in the bundle is not what was written.
    """
    if (given / MANIFEST).is_file():
        return _from_bundle(given, format)
    if (given / GENAI_CONFIG).is_file():
        given = given / "model.onnx"
    known = ", ".join(_FORMATS)
    if not given.exists():
        raise InputError(f"{given}: no such file or folder; give a bundle, or a file that ends in {known}")
    if given.suffix not in _FORMATS:
        raise InputError(f"{given}: neither a bundle nor a file that ends in {known}")
    if format is not None and _FORMATS[given.suffix] != format:
        raise InputError(f"{given}: is {_FORMATS[given.suffix]}, not {format}; --format chooses in a bundle")
    return Subject(str(given), given, _FORMATS[given.suffix], _task_of(given), _bytes_of(given))


def _from_bundle(folder: Path, format: str | None) -> Subject:
    manifest = read_manifest(folder)
    entry = manifest.artifact(format) if format else manifest.artifacts[0]
    if problems := [problem for problem in verify_files(folder) if problem.path.startswith(entry.path)]:
        raise GateError(f"{folder}: {problems[0]}; export the model again")
    return Subject(
        f"{folder.name}/{entry.path}",
        folder / entry.path,
        entry.format,
        manifest.model.task,
        entry.bytes,
        _tokenizer(folder, manifest, entry.format),
        manifest.runtime.get("context"),
        tuple(signature.name for signature in entry.signatures),
    )


def _tokenizer(folder: Path, manifest: Manifest, format: str) -> Path | None:
    named = str(dict(manifest.runtime.get("tokenizer") or {}).get(format, OWN_TOKENIZER))
    return folder / named if named in {entry.path for entry in manifest.files} else None


def _task_of(path: Path) -> str:
    """Return the task of a lone file; of encoders the kind does not matter to the clock."""
    if path.suffix == ".tflite":
        return EMBEDDING
    if path.suffix == ".onnx" and not path.with_name(GENAI_CONFIG).is_file():
        return _onnx_task(path)
    if path.suffix == ".pte":
        return _program_task(path)
    return GENERATION


def _program_task(path: Path) -> str:
    """Return the task of a program, by the constant methods that our encoders have and decoders have not."""
    from slm_export.errors import needs
    from slm_export.exporters.executorch_session import load_runtime

    with needs("executorch", "executorch"):
        runtime = load_runtime()
    try:
        program = runtime._load_program(
            str(path), program_verification=runtime.Verification.InternalConsistency
        )
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: ExecuTorch cannot load it: {error}; export the model again") from error
    names = {program.get_method_name(index) for index in range(program.num_methods())}
    return EMBEDDING if "get_min_seq_len" in names else GENERATION


def _onnx_task(path: Path) -> str:
    from slm_export.errors import needs

    with needs("onnx", "onnxruntime"):
        import onnxruntime
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding has a class for every status, and no common one
        raise InputError(f"{path}: ONNX Runtime cannot load it: {error}; export the model again") from error
    task = session.get_modelmeta().custom_metadata_map.get("slm_export.task")
    if task is None:
        raise InputError(
            f"{path}: no encoder of ours, and without a {GENAI_CONFIG} beside it no decoder for onnxruntime-genai; "
            "nothing says what inputs it wants"
        )
    return str(task)


def _bytes_of(path: Path) -> int:
    """Return the size of an artifact, data beside it included."""
    beside = path.parent.glob(f"{path.name}.data*") if path.suffix == ".onnx" else ()
    return size_of(path) + sum(map(size_of, beside))
