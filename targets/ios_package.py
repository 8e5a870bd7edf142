"""A bundle as a Swift package: ``Package.swift``, the code of one task and one format, tests and a README.

The code is in ``swift/``, as files that any Swift tool reads; only what differs from model to model is a template. An
app gets no line that its task or its format does not need.
"""

from __future__ import annotations

import json
import plistlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm_export.bundles.checksums import scan
from slm_export.bundles.manifest import MANIFEST
from slm_export.bundles.sbom import SBOM
from slm_export.results import Artifact
from slm_export.runtime import Proven
from slm_export.source.tasks import ANSWERING, CLASSIFICATION, EMBEDDING, FILLING, GENERATION, TOKENS
from slm_export.targets import ios_tokenizer
from slm_export.targets.ios_words import EXAMPLES, USES, entitlements, facts, memory_note, swift_string

FORMATS = ("coreml", "executorch")
"""The formats that there is Swift code for."""

CONFIG = "Resources/tokenizer_config.json"

_DECODER = ("decoder/LanguageModel.swift", "decoder/Sampler.swift", "decoder/Detokenizer.swift")
_TASKS: Mapping[str, tuple[str, ...]] = {
    GENERATION: _DECODER,
    EMBEDDING: ("encoder/TextEncoder.swift", "encoder/Embed.swift"),
    CLASSIFICATION: ("encoder/TextEncoder.swift", "encoder/Classify.swift"),
    TOKENS: ("encoder/TextEncoder.swift", "encoder/Tag.swift"),
    ANSWERING: ("encoder/TextEncoder.swift", "encoder/Answer.swift"),
    FILLING: ("encoder/TextEncoder.swift", "encoder/Fill.swift"),
}
_SHARED = {"coreml": "coreml/CompiledModel.swift", "executorch": "executorch/Program.swift"}
_KERNELS = ("executorch", "backend_xnnpack", "kernels_llm", "kernels_optimized", "kernels_quantized")

_TAKEN = frozenset(
    {"coreml", "executorch", "foundation", "hub", "tokenizers", "languagemodel", "textencoder", "model"}
)
"""Modules that the code imports, its own types, and the class that Xcode makes of Model.mlpackage: a module of that
name could not be told from them."""

_DOCUMENTS = (MANIFEST, SBOM, "report.json", "report.html")


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a package are, relative to the bundle."""

    name: str
    artifact: Artifact
    folder: Path

    @property
    def task_sources(self) -> str:
        return f"Sources/{self.name}"

    @property
    def tests(self) -> str:
        return f"Tests/{self.name}Tests"

    @property
    def entitlements(self) -> str:
        return f"{self.name}.entitlements"

    @property
    def resources(self) -> tuple[str, ...]:
        """What the app carries: the artifact, and the tokenizer's files that Swift reads."""
        templates = ("tokenizer/chat_template.jinja", "tokenizer/chat_template.json")
        present = tuple(path for path in templates if (self.folder / path).is_file())
        data = (self.artifact.path, *self.artifact.data)
        files = tuple(path.relative_to(self.folder).as_posix() for path in data)
        return (*files, "tokenizer/tokenizer.json", CONFIG, *present)


def write_package(made: Proven, folder: Path) -> None:
    """Write the Swift package of the first artifact into its bundle; the others stay plain files beside it."""
    artifact = made.artifacts[0]
    layout = _Layout(module_name(made.model.name), artifact, folder)
    texts = {
        **_sources(made, layout),
        **_tests(made, layout),
        CONFIG: _json(ios_tokenizer.swift_config(folder / "tokenizer")),
        "README.md": _readme(made, layout),
    }
    if needed := entitlements(artifact.bytes):
        texts[layout.entitlements] = plistlib.dumps(needed).decode()
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    # Last, because it names all that is in the folder.
    (folder / "Package.swift").write_text(_manifest(made, layout), encoding="utf-8", newline="\n")


def module_name(model: str) -> str:
    """Return a name for a Swift module: ``SmolLM2-135M`` -> ``SmolLM2135M``."""
    parts = re.findall(r"[A-Za-z0-9]+", model)
    name = "".join(part[0].upper() + part[1:] for part in parts)
    if not name or name[0].isdigit() or name.lower() in _TAKEN:
        name = f"Model{name or 'Model'}"
    return name


def _sources(made: Proven, layout: _Layout) -> dict[str, str]:
    format, task = layout.artifact.format, made.model.task
    runtime = "DecoderRuntime" if task == GENERATION else "EncoderRuntime"
    files = ("TokenizerFiles.swift", *_TASKS[task], _SHARED[format], f"{format}/{runtime}.swift")
    found = {f"{layout.task_sources}/{Path(file).name}": swift_file(file) for file in files}
    values = {"name": layout.name, "sha256": layout.artifact.sha256, "facts": facts(made)}
    return {**found, f"{layout.task_sources}/Facts.swift": _render("Facts.swift.j2", values)}


def _tests(made: Proven, layout: _Layout) -> dict[str, str]:
    kind = "LanguageModelTests" if made.model.task == GENERATION else "TextEncoderTests"
    names = ("TokenizerTests", kind)
    found = {
        f"{layout.tests}/{name}.swift": _render(f"tests/{name}.swift.j2", {"name": layout.name})
        for name in names
    }
    return {**found, f"{layout.tests}/tokens.json": _json(ios_tokenizer.probes(made.tokenizer))}


def _manifest(made: Proven, layout: _Layout) -> str:
    executorch = layout.artifact.format == "executorch"
    # A decoder in Core ML keeps its cache in states, which came with iOS 18.
    stateful = made.model.task == GENERATION
    ios = 17 if executorch else 18 if stateful else made.profile.coreml.ios
    values = {
        "name": layout.name,
        "ios": ios,
        # Core ML's versions go together: iOS 17 with macOS 14, iOS 18 with macOS 15.
        "macos": ios - 3,
        "tokenizers": ios_tokenizer.VERSION,
        "executorch": version("executorch").partition("+")[0] if executorch else None,
        "products": _KERNELS if executorch else (),
        "resources": layout.resources,
        "exclude": tuple(_excluded(layout)),
    }
    return _render("Package.swift.j2", values)


def _excluded(layout: _Layout) -> Iterator[str]:
    """Yield what in the bundle is neither code nor resource; Swift's build asks to be told."""
    own = (*layout.resources, layout.task_sources)
    plain, _ = scan(layout.folder)
    seen: set[str] = set()
    for path in sorted({*plain, *_DOCUMENTS} - {"Package.swift"}):
        if any(path == item or path.startswith(f"{item}/") for item in own):
            continue
        # A folder of which nothing is used is named as one.
        top = path.split("/")[0]
        whole = not any(item.split("/")[0] == top for item in own)
        if (entry := top if whole else path) not in seen:
            seen.add(entry)
            yield entry


def _readme(made: Proven, layout: _Layout) -> str:
    task = made.model.task
    others = [artifact.format for artifact in made.artifacts[1:]]
    note = f"The package uses `{layout.resources[0]}`."
    if others:
        note += f" What lies in {', '.join(f'`{name}/`' for name in others)} is for apps that bring their own code."
    values = {
        "name": layout.name,
        "model": made.model.name,
        "device": made.profile.title,
        "what": USES[task],
        "use": EXAMPLES[task],
        "memory": memory_note(layout.artifact.bytes, layout.entitlements),
        "probes": len(ios_tokenizer.probes(made.tokenizer)),
        "format_note": note,
    }
    return _render("README.md.j2", values)


def swift_file(file: str) -> str:
    """Return the text of a file of ``swift/``."""
    return resources.files("slm_export.targets").joinpath("swift", *file.split("/")).read_text("utf-8")


def _render(file: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    # Swift and Markdown, not HTML: strings are quoted by `swift_string`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["swift"] = swift_string
    return environment.from_string(swift_file(file)).render(values)


def _json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
