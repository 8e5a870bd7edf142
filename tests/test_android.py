"""The Gradle library around an artifact: what can be checked without Android, and its code with a Kotlin compiler."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from forked import Forked
from transformers import AutoConfig

from slm_export.bundles.bundle import verify_files
from slm_export.bundles.checksums import sha256_file
from slm_export.profile import load_profile
from slm_export.results import Artifact, ModelFacts, Signature
from slm_export.runtime import Proven
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, GENERATION, TOKENS, output_shape
from slm_export.targets import android_play
from slm_export.targets.android import Android
from slm_export.targets.android_library import LIBRARIES, kotlin_string, package_name
from slm_export.tokenization.tokenizer import SourceTokenizer

NAMES = {"executorch": "model.pte", "onnx": "model.onnx"}
STAND_INS = Path(__file__).with_name("kotlin")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"

Make = Callable[..., Path]

loaded = cache(SourceTokenizer.load)


def artifact(folder: Path, format: str, task: str, config: object) -> Artifact:
    """Write something of the right name where an exporter would."""
    decoder = task == GENERATION
    name = NAMES.get(format) or ("model.litertlm" if decoder else "model.tflite")
    path = folder / format / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"program")
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "int64[1, tokens]")
    output = "logits" if decoder else output_shape(task, config)[0]
    names = ("encode_64", "encode_16") if format == "litert" and not decoder else ("forward",)
    signatures = tuple(Signature(name, inputs, {output: "float32"}) for name in names)
    return Artifact(path, format, 7, sha256_file(path), 4.5, signatures)


@pytest.fixture
def told() -> list[tuple[str, ...]]:
    """What the target had to say of each bundle."""
    return []


@pytest.fixture
def make(tmp_path: Path, pycode: Path, minilm: Path, told: list[tuple[str, ...]]) -> Make:
    """Make a bundle of a task and formats, as the driver would leave it to the target."""

    def made(
        task: str = GENERATION,
        formats: tuple[str, ...] = ("executorch",),
        name: str = "pycode-5m",
        template: str | None = None,
    ) -> Path:
        model = pycode if task == GENERATION else minilm
        if template:
            model = shutil.copytree(model, tmp_path / "chatty")
            (model / "chat_template.jinja").write_text(template)
        folder = tmp_path / "bundle"
        folder.mkdir()
        tokenizer, target = loaded(model), Android()
        target.bundle(tokenizer, folder)
        parts = tuple(artifact(folder, format, task, AutoConfig.from_pretrained(model)) for format in formats)
        runtime = {"task": task, "context": 128, "labels": ["good", 'a "bad" one\n', "$5"]}
        if task == GENERATION:
            files = dict.fromkeys(formats, "tokenizer/tokenizer.json")
            runtime |= {
                "adds_bos": tokenizer.adds_bos,
                "stop_ids": list(tokenizer.stop_ids),
                "tokenizer": files,
            }
            runtime["chat_template"] = template is not None
        facts = ModelFacts(name, "X", task, 1, "0" * 64, 1)
        told.append(target.finish(Proven(facts, parts, load_profile("pixel-9"), tokenizer, runtime), folder))
        return folder

    return made


def kotlin_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / "android").rglob("*.kt")}


def assets_of(folder: Path, module: str) -> list[str]:
    """Return the paths in a bundle that a module's build takes."""
    text = (folder / "android" / module / "build.gradle.kts").read_text()
    listed = re.search(r"(?:modelFiles = listOf|include)\(\n(.*?)\n *\)", text, re.DOTALL)
    assert listed
    return re.findall(r'"([^"]+)"', listed[1])


@pytest.mark.parametrize(
    ("task", "format", "files"),
    [
        (GENERATION, "executorch", ["executorch/model.pte", "tokenizer/tokenizer.json"]),
        (GENERATION, "litert", ["litert/model.litertlm"]),
        (EMBEDDING, "executorch", ["executorch/model.pte", "tokenizer/tokenizer.json"]),
        (EMBEDDING, "litert", ["litert/model.tflite", "tokenizer/tokenizer.json"]),
        (CLASSIFICATION, "onnx", ["onnx/model.onnx", "tokenizer/tokenizer.json"]),
    ],
)
def test_both_modules_take_what_a_phone_needs_from_the_bundle(
    task: str, format: str, files: list[str], make: Make
) -> None:
    folder = make(task, (format,))
    assert assets_of(folder, "library") == assets_of(folder, "pack") == files
    assert all((folder / file).is_file() for file in files)
    library = (folder / "android" / "library" / "build.gradle.kts").read_text()
    assert f'noCompress += listOf("{Path(files[0]).suffix[1:]}")' in library
    assert f'implementation("{LIBRARIES[format, task == GENERATION][0]}:' in library
    # Twice the model would be twice the bundle.
    assert not [file for file in (folder / "android").rglob("*") if file.suffix in {".pte", ".onnx", ".json"}]


@pytest.mark.parametrize("formats", [("executorch",), ("litert",), ("onnx", "litert")])
@pytest.mark.parametrize("task", [GENERATION, EMBEDDING, CLASSIFICATION, TOKENS])
def test_every_placeholder_is_filled_and_every_constant_is_there(
    task: str, formats: tuple[str, ...], make: Make
) -> None:
    folder = make(task, formats)
    texts = {file: file.read_text() for file in (folder / "android").rglob("*") if file.is_file()}
    assert len(texts) >= 8
    for file, text in texts.items():
        assert not re.search(r"\{\{|\{%", text), file
    code = kotlin_of(folder)
    declared = set(re.findall(r"val (\w+) =", code.pop("Facts.kt")))
    used = set(re.findall(r"Facts\.(\w+)", "".join(code.values())))
    assert used <= declared
    # Names of outputs matter where a runtime asks by name; of inputs, their number always.
    assert declared - used <= {"INPUTS", "CONTEXT"}


def test_the_first_format_that_has_a_library_is_taken(make: Make) -> None:
    folder = make(GENERATION, ("onnx", "litert"))
    assert "litertlm" in kotlin_of(folder)["SlmModel.kt"]


def test_a_format_without_a_library_comes_with_its_files_and_says_so(make: Make) -> None:
    folder = make(GENERATION, ("onnx",))
    assert sorted(kotlin_of(folder)) == ["Facts.kt", "SlmFiles.kt"]
    assert "dependencies" not in (folder / "android" / "library" / "build.gradle.kts").read_text()
    assert "There is no `SlmModel` here" in (folder / "android" / "README.md").read_text()


def test_an_encoder_says_that_it_reads_no_text(make: Make) -> None:
    folder = make(EMBEDDING)
    assert "fun embed(tokens: IntArray): FloatArray" in kotlin_of(folder)["SlmModel.kt"]
    assert "the app brings a tokenizer" in (folder / "android" / "README.md").read_text()


def test_a_decoder_takes_stop_tokens_and_opening_token_from_the_manifest(make: Make, pycode: Path) -> None:
    facts = kotlin_of(make())["Facts.kt"]
    tokenizer = loaded(pycode)
    stops = [tokenizer.backend.convert_ids_to_tokens(id) for id in tokenizer.stop_ids]
    assert stops
    assert f"STOP_TEXTS = setOf<String>({', '.join(map(json.dumps, stops))})" in facts
    assert f"BOS = {int(tokenizer.adds_bos)}" in facts
    assert "CHAT" not in facts


def test_a_chat_template_becomes_what_stands_around_a_message(make: Make) -> None:
    code = kotlin_of(make(template=TEMPLATE))
    assert 'CHAT_BEFORE = "<|user|>"' in code["Facts.kt"]
    assert 'CHAT_AFTER = "\\n<|assistant|>"' in code["Facts.kt"]
    assert "fun chat(" in code["SlmModel.kt"]


def test_a_template_that_repeats_a_message_is_none_of_two_ends(make: Make) -> None:
    twice = "{{ messages[0].content }} {{ messages[0].content }}"
    assert "fun chat(" not in kotlin_of(make(template=twice))["SlmModel.kt"]


@pytest.mark.parametrize(
    ("megabytes", "delivery"),
    [(1, "app"), (199, "app"), (200, "asset pack"), (1500, "asset pack"), (1501, "own download")],
)
def test_plays_limits_decide_how_a_model_is_delivered(megabytes: int, delivery: str) -> None:
    assert android_play.fit(megabytes * 1_000_000).delivery == delivery


def test_the_size_that_is_judged_is_of_all_files_together(
    make: Make, told: list[tuple[str, ...]], pycode: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (pycode / "tokenizer.json").stat().st_size + len(b"program")
    folder = make()
    assert told == [()]
    shutil.rmtree(folder)
    monkeypatch.setattr(android_play, "BASE_MODULE", size)
    assert "too many for the app" in (make() / "android" / "README.md").read_text()
    # What cannot be in the app is said in the report too.
    assert "too many for the app" in told[1][0]


@pytest.mark.parametrize(
    ("model", "name"),
    [("SmolLM2-135M", "smollm2_135m"), ("7b.chat", "model_7b_chat"), ("模型", "model")],
)
def test_a_package_is_named_after_its_model(model: str, name: str) -> None:
    assert package_name(model) == name


def test_strings_of_kotlin_are_quoted() -> None:
    assert kotlin_string('a"\\\n$b\f模') == '"a\\"\\\\\\n\\$b\\u000c\\u6a21"'


@pytest.mark.slow
def test_an_export_has_the_library_and_verifies(tiny_llama: Path, tmp_path: Path, quick_cli: Forked) -> None:
    out = tmp_path / "out"
    done = quick_cli(
        tiny_llama,
        "--target",
        "android",
        "--format",
        "onnx",
        "--no-verify",
        "--no-bench",
        "--out",
        out,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert verify_files(out) == ()
    files = assets_of(out, "library")
    assert "onnx/model.onnx" in files
    assert "onnx/genai_config.json" in files
    assert all((out / file).is_file() for file in files)
    (out / "android" / "README.md").write_text("")
    assert [problem.path for problem in verify_files(out)] == ["android/README.md"]


def compiled(sources: list[Path], out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kotlinc", *map(str, sources), "-nowarn", "-d", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kotlinc") is None, reason="no kotlinc: apt-get install kotlin")
def test_a_compiler_takes_the_code_of_every_task_and_format(make: Make, tmp_path: Path) -> None:
    cases = [
        (task, format)
        for task in (EMBEDDING, CLASSIFICATION, TOKENS)
        for format in ("executorch", "litert", "onnx")
    ]
    cases += [(GENERATION, "litert"), (GENERATION, "executorch")]
    code = tmp_path / "code"
    for at, (task, format) in enumerate(cases):
        template = TEMPLATE if at == len(cases) - 1 else None
        # A package for each, so that one run of the compiler takes them all.
        folder = make(task, (format,), name=f"case {at}", template=template)
        shutil.copytree(folder / "android/library/src/main/kotlin", code, dirs_exist_ok=True)
        shutil.rmtree(folder)
    sources = [*code.rglob("*.kt"), *STAND_INS.glob("*.kt")]
    done = compiled(sources, tmp_path / "classes")
    assert done.returncode == 0, done.stderr
    # The same compiler has an eye for types.
    wrong = code / "model" / "slm_case_0" / "SlmModel.kt"
    wrong.write_text(wrong.read_text().replace("runtime.scores(tokens, types)", "runtime.scores(types)"))
    assert compiled(sources, tmp_path / "again").returncode != 0
