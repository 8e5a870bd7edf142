"""The Swift package around an artifact: what of it can be checked without Swift."""

from __future__ import annotations

import json
import plistlib
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_swift
from conftest import Cli
from transformers import AutoConfig

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.bundles.checksums import scan, sha256_file, size_of
from slm_export.errors import InputError
from slm_export.exporters import coreml_graph as names
from slm_export.exporters import coreml_metadata as keys
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.profile import CoreML, load_profile
from slm_export.results import Artifact, ModelFacts, Signature
from slm_export.runtime import Proven
from slm_export.source.tasks import (
    ANSWERING,
    CLASSIFICATION,
    EMBEDDING,
    FILLING,
    GENERATION,
    TOKENS,
    output_shape,
)
from slm_export.targets import ios_package, ios_tokenizer, ios_words
from slm_export.targets.ios import Ios
from slm_export.tokenization.tokenizer import SourceTokenizer

TASKS = (GENERATION, EMBEDDING, CLASSIFICATION, TOKENS, ANSWERING, FILLING)
FORMATS = {"coreml": "coreml/Model.mlpackage", "executorch": "executorch/model.pte"}
SWIFT = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
DATA = Path(ios_package.__file__).with_name("swift")

Make = Callable[..., Path]

loaded = cache(SourceTokenizer.load)


def broken(text: str) -> list[str]:
    """Return what a parser of Swift cannot read in a text."""

    def visit(node: tree_sitter.Node) -> Iterator[str]:
        if node.type == "ERROR" or node.is_missing:
            yield f"line {node.start_point.row + 1}: {text.splitlines()[node.start_point.row]}"
        for child in node.children:
            yield from visit(child)

    return list(visit(SWIFT.parse(text.encode()).root_node))


def artifact(folder: Path, format: str, task: str, size: int, config: Any) -> Artifact:
    """Write something of the right name where an exporter would."""
    path = folder / FORMATS[format]
    path.parent.mkdir(parents=True)
    if format == "coreml":
        path.mkdir()
        (path / "Manifest.json").write_text("{}")
    else:
        path.write_bytes(b"program")
    output = "logits" if task == GENERATION else output_shape(task, config)[0]
    return Artifact(path, format, size, sha256_file(path), 4.5, (Signature("main", {}, {output: ""}),))


@pytest.fixture
def make(tmp_path: Path, pycode: Path, minilm: Path) -> Make:
    """Make a bundle of a task and formats, as the driver would leave it to the target."""

    def made(
        task: str = GENERATION,
        formats: tuple[str, ...] = ("coreml",),
        name: str = "pycode-5m",
        size: int = 10_000_000,
        coreml: CoreML | None = None,
        template: str | None = None,
    ) -> Path:
        model = pycode if task == GENERATION else minilm
        folder = tmp_path / "bundle"
        folder.mkdir()
        tokenizer, target = loaded(model), Ios()
        target.bundle(tokenizer, folder)
        if template:
            (folder / "tokenizer" / "chat_template.jinja").write_text(template)
        config = AutoConfig.from_pretrained(model)
        parts = tuple(artifact(folder, format, task, size, config) for format in formats)
        facts = ModelFacts(name, "X", task, 1, "0" * 64, 1)
        profile = load_profile("iphone-15-pro").model_copy(update={"coreml": coreml or CoreML()})
        runtime = {"task": task, "labels": ["good", 'a "bad" one\n']}
        target.finish(Proven(facts, parts, profile, tokenizer, runtime), folder)
        return folder

    return made


def listed(manifest: str, key: str) -> list[str]:
    """Return the paths in one list of a Package.swift."""
    return re.findall(r'"([^"]+)"', manifest.split(f"{key}: [")[1].split("\n            ]")[0])


@pytest.mark.parametrize("file", sorted(DATA.rglob("*.swift")), ids=lambda file: file.name)
def test_the_code_is_swift(file: Path) -> None:
    assert broken(file.read_text()) == []


def test_what_is_no_swift_is_noticed() -> None:
    assert broken("func f( { return 1 }")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_every_generated_file_is_swift(task: str, format: str, make: Make) -> None:
    folder = make(task, (format,), name='a "quoted" \\ model')
    files = sorted(folder.rglob("*.swift"))
    assert len(files) >= 8
    for file in files:
        assert broken(file.read_text()) == [], file
        assert "{{" not in file.read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_a_package_has_only_what_its_task_and_format_need(format: str, make: Make) -> None:
    folder = make(GENERATION, (format,))
    code = "".join(file.read_text() for file in (folder / "Sources").rglob("*.swift"))
    assert "func generate(" in code
    assert not re.search("TextEncoder|func embed|func classify", code)
    imported = set(re.findall(r"^import (\w+)", code, re.MULTILINE))
    others = {"coreml": {"CoreML", "Accelerate"}, "executorch": {"ExecuTorch"}}
    assert imported == {"Foundation", "Tokenizers"} | others[format]


@pytest.mark.parametrize(
    ("task", "function"),
    [
        (EMBEDDING, "func embed(_ text: String) async throws -> [Float]"),
        (CLASSIFICATION, "func classify(_ text: String)"),
        (TOKENS, "func tag(_ text: String)"),
        (ANSWERING, "func answer(_ question: String, in passage: String)"),
        (FILLING, "func fill(_ text: String"),
    ],
)
def test_an_encoder_has_the_function_of_its_task_alone(task: str, function: str, make: Make) -> None:
    code = "".join(file.read_text() for file in (make(task) / "Sources").rglob("*.swift"))
    assert function in code
    public = re.findall(r"^    public (?:static )?func (\w+)", code, re.MULTILINE)
    assert sorted(public) == sorted(["load", function.split("(")[0].removeprefix("func ")])


def test_every_constant_that_the_code_uses_is_there(make: Make) -> None:
    for task in TASKS:
        folder = make(task)
        code = "".join(file.read_text() for file in (folder / "Sources").rglob("*.swift"))
        used = set(re.findall(r"Facts\.(\w+)", code))
        made = set(re.findall(r"static let (\w+)", (folder / "Sources/Pycode5m/Facts.swift").read_text()))
        assert used <= made, task
        # What nothing reads would be a mistake too; the decoder in ExecuTorch needs no name for a cache.
        assert made - used <= {"name", "sha256"}, task
        shutil.rmtree(folder)


@pytest.mark.parametrize("formats", [("coreml",), ("executorch",), ("executorch", "coreml")])
def test_the_manifest_accounts_for_every_file_of_the_bundle(formats: tuple[str, ...], make: Make) -> None:
    folder = make(GENERATION, formats)
    for later in ("manifest.json", "report.json", "report.html", "sbom.cdx.json"):
        (folder / later).touch()
    manifest = (folder / "Package.swift").read_text()
    places = {key: listed(manifest, key) for key in ("exclude", "resources")}
    for paths in places.values():
        assert paths
        assert [path for path in paths if not (folder / path).exists()] == []
    own = [*places["exclude"], *places["resources"], "Sources/Pycode5m", "Package.swift"]
    # No file is two things, and none is forgotten: Swift's build refuses the one and complains of the other.
    for path in scan(folder)[0]:
        assert len([item for item in own if path == item or path.startswith(f"{item}/")]) == 1, path
    assert places["resources"][0] == FORMATS[formats[0]]


@pytest.mark.parametrize(
    ("task", "format", "coreml", "platforms"),
    [
        (EMBEDDING, "coreml", CoreML(), '.iOS("18.0"), .macOS("15.0")'),
        (EMBEDDING, "coreml", CoreML(ios=17), '.iOS("17.0"), .macOS("14.0")'),
        (GENERATION, "coreml", CoreML(ios=17), '.iOS("18.0"), .macOS("15.0")'),
        (GENERATION, "executorch", CoreML(), '.iOS("17.0"), .macOS("14.0")'),
    ],
)
def test_a_package_asks_for_the_system_that_it_needs(
    task: str, format: str, coreml: CoreML, platforms: str, make: Make
) -> None:
    manifest = (make(task, (format,), coreml=coreml) / "Package.swift").read_text()
    assert f"platforms: [{platforms}]" in manifest
    assert manifest.startswith("// swift-tools-version: 5.10\n")
    assert ("pytorch/executorch" in manifest) == (format == "executorch")
    assert 'swift-transformers", exact: "1.3.3"' in manifest


def test_the_decoder_speaks_of_core_ml_in_the_exporters_words() -> None:
    assert words("coreml", "DecoderRuntime") == {
        "prefill": names.PREFILL,
        "decode": names.DECODE,
        "inputIds": names.IDS,
        "causalMask": names.MASK,
        "logits": names.LOGITS,
        "context": keys.CONTEXT,
        "stopIds": keys.STOP_IDS,
        "most": keys.PREFILL,
    }


def test_the_encoder_speaks_of_core_ml_in_the_exporters_words() -> None:
    said = words("coreml", "EncoderRuntime")
    assert said.pop("lengths") == keys.LENGTHS
    # The order of the inputs of every encoder here.
    assert list(said.values()) == ["input_ids", "attention_mask", "token_type_ids"]


def test_core_mls_package_is_found_under_its_name(make: Make) -> None:
    code = (DATA / "coreml" / "CompiledModel.swift").read_text()
    assert 'forResource: "Model", withExtension: "mlpackage"' in code
    assert FORMATS["coreml"].endswith("/Model.mlpackage")


def words(format: str, runtime: str) -> dict[str, str]:
    """Return the names that a runtime's code asks a file for."""
    code = (DATA / format / f"{runtime}.swift").read_text()
    return dict(re.findall(r'static let (\w+) = "([^"]+)"', code))


def test_the_encoder_speaks_of_executorch_in_the_exporters_words() -> None:
    said = words("executorch", "EncoderRuntime")
    assert said.pop("forward") == "forward"
    source = Path(ios_package.__file__).parents[1] / "exporters" / "executorch.py"
    assert [name for name in said.values() if f'"{name}"' not in source.read_text()] == []


@pytest.mark.parametrize(
    ("model", "module"),
    [
        ("SmolLM2-135M", "SmolLM2135M"),
        ("pycode-5m", "Pycode5m"),
        ("7b-chat", "Model7bChat"),
        ("core_ml", "ModelCoreMl"),
        ("CoreML", "ModelCoreML"),
        ("tokenizers", "ModelTokenizers"),
        ("model", "ModelModel"),
        ("模型", "ModelModel"),
    ],
)
def test_a_module_is_named_after_its_model(model: str, module: str) -> None:
    assert ios_package.module_name(model) == module


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("a", '"a"'),
        ('"\\', '"\\"\\\\"'),
        ("a\nb\t", '"a\\nb\\t"'),
        ("\\(secret)", '"\\\\(secret)"'),
        ("\x00é\u200b", '"\\u{0}é\\u{200B}"'),
    ],
)
def test_strings_of_swift_are_quoted(text: str, literal: str) -> None:
    assert ios_words.swift_string(text) == literal
    assert broken(f"let x = {literal}\n") == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (499_999_999, set()),
        (500_000_000, {"increased-memory-limit"}),
        (2_000_000_000, {"increased-memory-limit", "extended-virtual-addressing"}),
    ],
)
def test_entitlements_are_asked_for_where_they_are_needed(size: int, expected: set[str], make: Make) -> None:
    folder = make(size=size)
    file = folder / "Pycode5m.entitlements"
    found = plistlib.loads(file.read_bytes()) if file.exists() else {}
    assert found == {f"com.apple.developer.kernel.{name}": True for name in expected}
    assert ("Pycode5m.entitlements" in (folder / "README.md").read_text()) == bool(expected)
    assert ("Pycode5m.entitlements" in (folder / "Package.swift").read_text()) == bool(expected)


def test_the_tokenizer_is_told_to_swift_by_what_it_is(make: Make, pycode: Path) -> None:
    decoder = json.loads((make() / ios_package.CONFIG).read_text())
    assert decoder["tokenizer_class"] == "PreTrainedTokenizer"
    assert decoder["clean_up_tokenization_spaces"] is False
    assert decoder["bos_token"] == json.loads((pycode / "tokenizer_config.json").read_text())["bos_token"]


def test_a_chat_template_is_among_the_resources(make: Make) -> None:
    manifest = (make(template="{{ messages }}") / "Package.swift").read_text()
    assert "tokenizer/chat_template.jinja" in listed(manifest, "resources")


def test_a_wordpiece_tokenizer_takes_its_case_from_the_normalizer(make: Make) -> None:
    encoder = json.loads((make(EMBEDDING) / ios_package.CONFIG).read_text())
    assert encoder["tokenizer_class"] == "BertTokenizer"
    assert encoder["do_lower_case"] is True


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"merges": [], "vocab": {}}, "PreTrainedTokenizer"),
        ({"unk_id": 0, "vocab": []}, "XLMRobertaTokenizer"),
        ({"max_input_chars_per_word": 100}, "BertTokenizer"),
    ],
)
def test_early_tokenizer_files_are_known_by_their_keys(
    model: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert ios_tokenizer.swift_config(tmp_path)["tokenizer_class"] == kind


def test_a_tokenizer_that_swift_cannot_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    with pytest.raises(InputError, match=r"kind WordLevel, which swift-transformers 1\.3\.3 cannot read"):
        ios_tokenizer.check_tokenizer(tmp_path)


def test_the_packages_own_test_holds_what_the_source_reads(make: Make, pycode: Path) -> None:
    probes = json.loads((make() / "Tests/Pycode5mTests/tokens.json").read_text())
    tokenizer = SourceTokenizer.load(pycode)
    assert len(probes) > 30
    for probe in probes:
        assert tokenizer.encode_with_template(probe["text"]) == probe["tokens"]
        assert tokenizer.decode(probe["inner"]) == probe["decoded"]


def test_a_question_and_its_passage_are_joined_as_the_tokenizer_does(make: Make, minilm: Path) -> None:
    text = (make(ANSWERING) / "Sources/Pycode5m/Facts.swift").read_text()
    parts = dict(re.findall(r"static let (pair\w+) = (.+)", text))
    opening, middle, closing = (json.loads(parts[f"pair{name}"]) for name in ("Opening", "Middle", "Closing"))
    tokenizer = SourceTokenizer.load(minilm)
    question, passage = "Who is there?", "A cat, it seems."
    first = [*opening, *tokenizer.encode(question), *middle]
    second = [*tokenizer.encode(passage), *closing]
    types = [0] * len(first) + [int(parts["pairType"])] * len(second)
    assert ([*first, *second], types) == tokenizer.encode_pair(question, passage)


def test_the_same_model_gives_the_same_package(make: Make) -> None:
    folder = make(CLASSIFICATION)
    first = sha256_file(folder)
    shutil.rmtree(folder)
    assert sha256_file(make(CLASSIFICATION)) == first


def test_an_export_is_a_package_that_verifies(tiny_llama: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    done = cli(
        tiny_llama, "--target", "ios", "--format", "executorch", "--no-verify", "--no-bench", "--out", out
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    paths = {entry.path for entry in manifest.files}
    assert {
        "Package.swift",
        "README.md",
        "Sources/TinyLlama/LanguageModel.swift",
        ios_package.CONFIG,
    } <= paths
    assert verify_files(out) == ()
    text = (out / "Package.swift").read_text()
    assert [
        path for key in ("exclude", "resources") for path in listed(text, key) if not (out / path).exists()
    ] == []
    assert size_of(out / FORMATS["executorch"]) == manifest.artifact("executorch").bytes
    session = ExecuTorchExporter().open(out / FORMATS["executorch"], GENERATION)
    said = words("executorch", "DecoderRuntime")
    assert set(said.values()) - {said["forward"]} <= set(session.metadata())
    (out / "Sources" / "TinyLlama" / "Sampler.swift").write_text("")
    assert [problem.path for problem in verify_files(out)] == ["Sources/TinyLlama/Sampler.swift"]
