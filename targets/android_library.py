"""A bundle as Android's build takes it: ``android/`` with a Gradle library, a Play asset pack and Kotlin code.

No file of the model is copied: Gradle takes the artifact and the tokenizer from where they lie in the bundle. The code
is in ``kotlin/``; an app gets that of its task and its format, which is the first of the bundle whose runtime is in a
Maven repository. A decoder in ONNX has none there (onnxruntime-genai's AAR is built from source): its files come alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm_export.results import Artifact
from slm_export.runtime import Proven
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, GENERATION
from slm_export.targets.android_play import Fit, fit

FOLDER = "android"
LIBRARIES: Mapping[tuple[str, bool], tuple[str, str]] = {
    ("executorch", True): ("org.pytorch:executorch-android", "executorch"),
    ("executorch", False): ("org.pytorch:executorch-android", "executorch"),
    ("litert", True): ("com.google.ai.edge.litertlm:litertlm-android", "litert-lm"),
    ("litert", False): ("com.google.ai.edge.litert:litert", "ai-edge-litert"),
    ("onnx", False): ("com.microsoft.onnxruntime:onnxruntime-android", "onnxruntime"),
}
"""Format, whether it is a decoder -> library, and the Python package that has the same release number."""

_KEPT: Mapping[str, tuple[str, ...]] = {
    # Native code finds these by name.
    "executorch": ("org.pytorch.executorch", "com.facebook.jni"),
    "litert": ("com.google.ai.edge.litertlm", "org.tensorflow.lite"),
    "onnx": ("ai.onnxruntime",),
}
_PROBE = "slm-export-message"
_USES: Mapping[str, str] = {
    GENERATION: 'model.generate("Once upon a time") { piece -> print(piece) }',
    EMBEDDING: "val vector = model.embed(tokens)",
    CLASSIFICATION: "val classes = model.classify(tokens)",
}


def write_library(made: Proven, folder: Path) -> Fit:
    """Write ``android/`` beside the artifacts of a bundle; return how they can be delivered through Google Play."""
    artifact = _chosen(made)
    decoder = made.model.task == GENERATION
    values = _values(made, artifact, folder)
    values["readme_chosen"] = artifact.path.relative_to(folder).as_posix()
    texts = {
        "README.md": _render("README.md.j2", values),
        "pack/build.gradle.kts": _render("pack.gradle.kts.j2", values),
        "library/build.gradle.kts": _render("library.gradle.kts.j2", values),
        "library/consumer-rules.pro": _render("consumer-rules.pro.j2", values),
        "library/src/main/AndroidManifest.xml": _file("AndroidManifest.xml"),
    }
    code = f"library/src/main/kotlin/{values['package'].replace('.', '/')}"
    for name, template in _code(artifact.format, decoder):
        texts[f"{code}/{name}.kt"] = _render(template, values)
    for path, text in texts.items():
        file = folder / FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    found: Fit = values["fit"]
    return found


def package_name(model: str) -> str:
    """Return a name for a package of Kotlin and an asset pack: ``SmolLM2-135M`` -> ``smollm2_135m``."""
    name = "_".join(re.findall(r"[a-z0-9]+", model.lower()))
    return name if name[:1].isalpha() else f"model_{name}".rstrip("_")


def kotlin_string(text: str) -> str:
    """Return a string literal of Kotlin."""
    # JSON's escapes are Kotlin's but for two: \f is not known, and a dollar begins a template.
    return json.dumps(text).replace("\\f", "\\u000c").replace("$", "\\$")


def _chosen(made: Proven) -> Artifact:
    decoder = made.model.task == GENERATION
    known = [item for item in made.artifacts if (item.format, decoder) in LIBRARIES]
    return (known or list(made.artifacts))[0]


def _code(format: str, decoder: bool) -> Iterable[tuple[str, str]]:
    """Yield a file's name and its template."""
    yield "SlmFiles", "SlmFiles.kt.j2"
    yield "Facts", "Facts.kt.j2"
    if (format, decoder) not in LIBRARIES:
        return
    if decoder:
        yield "SlmModel", f"decoder/{format}.kt.j2"
    else:
        yield "SlmModel", "encoder/SlmModel.kt.j2"
        yield "Runtime", f"encoder/{format}.kt.j2"


def _files(made: Proven, artifact: Artifact, folder: Path) -> list[str]:
    """Return what a phone is given, relative to the bundle."""
    paths = [artifact.path, *artifact.data]
    if made.model.task == GENERATION and artifact.format == "onnx":
        # onnxruntime-genai opens the folder.
        paths = sorted(path for path in artifact.path.parent.rglob("*") if path.is_file())
    found = [path.relative_to(folder).as_posix() for path in paths]
    tokenizer = _tokenizer(made, artifact)
    return [*found, *([tokenizer] if tokenizer and tokenizer not in found else [])]


def _tokenizer(made: Proven, artifact: Artifact) -> str | None:
    """Return the tokenizer's file that is needed beside the artifact; LiteRT-LM has it inside, ONNX in its folder."""
    if made.model.task != GENERATION:
        return "tokenizer/tokenizer.json"
    return str(made.runtime["tokenizer"]["executorch"]) if artifact.format == "executorch" else None


def _values(made: Proven, artifact: Artifact, folder: Path) -> dict[str, Any]:
    format, decoder = artifact.format, made.model.task == GENERATION
    name = package_name(made.model.name)
    files = _files(made, artifact, folder)
    size = sum((folder / file).stat().st_size for file in files)
    library = LIBRARIES.get((format, decoder))
    kept = _KEPT.get(format, ()) if library else ()
    return {
        # Two parts, as Android wants it, of which neither can be a keyword.
        "package": f"model.slm_{name}",
        "assets": f"slm_{name}",
        "model": made.model.name.replace("\n", " "),
        "device": made.profile.title,
        "task": made.model.task,
        "format": format,
        "decoder": decoder,
        "sha256": artifact.sha256,
        "files": files,
        "suffixes": sorted({Path(file).suffix.lstrip(".") for file in files} - {"json", ""}),
        "library": f"{library[0]}:{version(library[1]).partition('+')[0]}" if library else None,
        "rules_note": "Classes that native code finds by name." if kept else "No rule is needed.",
        "rules": [f"-keep class {package}.** {{ *; }}" for package in kept],
        "fit": fit(size),
        "delivery": "on-demand" if decoder else "install-time",
        "use": _USES.get(made.model.task, "val scores = model.scores(tokens)"),
        "chat": _chat(made),
        "facts": _facts(made, artifact, folder) if library else {},
    }


def _facts(made: Proven, artifact: Artifact, folder: Path) -> dict[str, str]:
    """Return the constants that the code of a task and a format reads: declaration -> expression."""
    model = artifact.path.relative_to(folder).as_posix()
    found = {
        "const val MODEL": kotlin_string(model),
        "const val CONTEXT": str(made.runtime["context"]),
    }
    if made.model.task == GENERATION:
        return found | (_runner_facts(made, artifact) if artifact.format == "executorch" else {})
    signature = artifact.signatures[0]
    found["const val PAD"] = str(made.tokenizer.pad_id)
    found["val INPUTS"] = _list(map(kotlin_string, signature.inputs))
    if artifact.format != "executorch":
        found["const val OUTPUT"] = kotlin_string(next(iter(signature.outputs)))
    if artifact.format == "litert":
        lengths = sorted(int(item.name.rpartition("_")[2]) for item in artifact.signatures)
        found["val LENGTHS"] = _list(map(str, lengths))
    if made.model.task == CLASSIFICATION:
        found["val LABELS"] = _list(map(kotlin_string, made.runtime["labels"]))
    return found


def _runner_facts(made: Proven, artifact: Artifact) -> dict[str, str]:
    stops = made.tokenizer.backend.convert_ids_to_tokens(list(made.runtime["stop_ids"]))
    found = {
        "const val TOKENIZER": kotlin_string(str(_tokenizer(made, artifact))),
        "const val BOS": str(int(made.runtime["adds_bos"])),
        "val STOP_TEXTS": f"setOf<String>({', '.join(map(kotlin_string, stops))})",
    }
    if chat := _chat(made):
        found["const val CHAT_BEFORE"], found["const val CHAT_AFTER"] = map(kotlin_string, chat)
    return found


def _chat(made: Proven) -> tuple[str, str] | None:
    """Return what the chat template puts around a message; None without one, or where it is more than two ends."""
    if not made.runtime.get("chat_template"):
        return None
    before, found, after = (made.tokenizer.render_chat(_PROBE) or "").partition(_PROBE)
    return (before, after) if found and _PROBE not in after else None


def _list(items: Iterable[str]) -> str:
    return f"listOf({', '.join(items)})"


def _file(name: str) -> str:
    return resources.files("slm_export.targets").joinpath("kotlin", *name.split("/")).read_text("utf-8")


def _render(file: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    # Kotlin and Markdown, not HTML: strings are quoted by `kotlin_string`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["kotlin"] = kotlin_string
    return environment.from_string(_file(file)).render(values)
