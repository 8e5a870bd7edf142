"""TensorFlow models through the command line: what comes out, what is refused, and what must not pass."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, command, environment
from forked import Forked
from keras_models import TOKENS, VOCABULARY, texts
from rich.console import Console

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.bundles.checksums import sha256_file
from slm_export.compilation import Request, make_plan
from slm_export.errors import InputError
from slm_export.keras import export as keras_export
from slm_export.progress import Progress
from slm_export.recipe import QuantizationOptions

here = [name for name in ("tensorflow", "ai_edge_litert") if importlib.util.find_spec(name) is None]
needs_tensorflow = pytest.mark.skipif(
    bool(here), reason=f"{', '.join(here)} not installed: slm-export[tensorflow]"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of `keras_models`, made in a process of its own."""
    folder = tmp_path_factory.mktemp("keras")
    script = Path(__file__).with_name("keras_models.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def quick() -> Iterator[Forked]:
    """The command line in a process of its own, without the seconds that TensorFlow's import takes."""
    server = [sys.executable, Path(__file__).with_name("keras_server.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        server, env=environment(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        yield Forked(process)
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def bundle(
    quick: Forked, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The LSTM, exported with its labels, judged on real ids."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(models / "lstm.keras", folder / "lstm.keras")
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    ids, _ = texts(200, 2)
    lines = [" ".join(str(token) for token in row[row > 0]) for row in ids]
    (folder / "held-out.txt").write_text("\n".join(lines) + "\n")
    return exported(quick, folder / "lstm.keras", folder, "--eval-text", str(folder / "held-out.txt"))


def exported(quick: Forked, model: Path, folder: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    done = quick(model, "--target", "android", "--out", "out", "--json", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess[str], folder: Path, code: int = 2) -> str:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not [path.name for path in folder.iterdir() if path.name == "out" or path.suffix == ".partial"]
    return done.stderr.partition("error: ")[2]


def figures(document: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in document["formats"][0]["checks"]}


@needs_tensorflow
def test_a_recurrent_classifier_is_as_good_as_its_source(bundle: tuple[Path, dict[str, Any]]) -> None:
    out, document = bundle
    assert document["passed"]
    assert document["model"]["architecture"] == "Functional(Embedding, LSTM, Dense)"
    (made,) = document["formats"]
    assert made["quality"]["sentences"] == 200
    assert made["quality"]["agreement"] >= 0.99
    assert 0 < made["quality"]["lowering_max_abs"] < 0.05
    assert figures(document).keys() >= {
        "agreement",
        "tensorflow_agreement",
        "lowering_share",
        "stored_weights",
    }
    assert made["latency"]["latency_ms"]["p50"] > 0
    (row,) = document["passes"]
    assert row["changed"] == 5
    assert row["bytes_after"] < 0.3 * row["bytes_before"]
    assert all(row["skipped"].values())
    assert row["skipped"]["lstm/lstm_cell/bias"] == "a vector: small, and precision matters"
    assert verify_files(out) == ()
    manifest = read_manifest(out)
    assert {entry.path for entry in manifest.files} >= {"litert/model.tflite", "report.html", "sbom.cdx.json"}
    assert manifest.runtime["labels"] == ["red", "green", "blue"]
    assert "tensorflow" in manifest.toolchain


@needs_tensorflow
def test_the_codes_in_the_file_are_those_of_the_grid(
    bundle: tuple[Path, dict[str, Any]], models: Path
) -> None:
    import zipfile

    h5py = pytest.importorskip("h5py")
    import io

    import torch

    from slm_export.exporters.litert_reader import read_weights
    from slm_export.optimizers.group_quantize import quantize

    stored = read_weights(bundle[0] / "litert" / "model.tflite")
    with h5py.File(io.BytesIO(zipfile.ZipFile(models / "lstm.keras").read("model.weights.h5"))) as file:
        table = torch.from_numpy(file["layers/embedding/vars/0"][:])
        kernel = torch.from_numpy(file["layers/lstm/cell/vars/0"][:]).T.contiguous()
    for name, values in (("embedding/embeddings", table), ("lstm/lstm_cell/kernel", kernel)):
        meant = quantize(values, 8, values.shape[1])
        assert torch.equal(stored[name].packed, meant.packed)
        assert torch.equal(stored[name].scales, meant.scales)
    assert stored["embedding/embeddings"].shape == (VOCABULARY, 32)


@needs_tensorflow
def test_a_bundle_is_verified_and_run_without_tensorflow(
    bundle: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not here')\n")
    env = environment({"PYTHONPATH": str(tmp_path)})

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*args), env=env, capture_output=True, text=True, check=False)

    done = run("verify", bundle[0], "--json")
    assert done.returncode == 0, done.stderr
    assert {check["name"] for check in json.loads(done.stdout)["checks"]["litert"]} == {
        "stored_weights",
        "runs",
    }
    missing = run("m.keras", "--target", "android")
    assert missing.returncode == 3
    assert "pip install 'slm-export[tensorflow]'" in missing.stderr


@needs_tensorflow
def test_a_bundle_without_a_tokenizer_is_run_on_ids(
    bundle: tuple[Path, dict[str, Any]], tmp_path: Path, quick: Forked
) -> None:
    def run(prompt: str) -> subprocess.CompletedProcess[str]:
        return quick("run", bundle[0], "--prompt", prompt, "--json", cwd=tmp_path)

    document = json.loads(run("4 7 10 13 16").stdout)
    assert document["label"] == "green"
    assert sum(document["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert "not ids" in run("good morning").stderr
    assert "no row" in run(f"5 {VOCABULARY}").stderr
    assert "takes at most 24" in run("5 " * 25).stderr


@needs_tensorflow
def test_verify_with_the_source_repeats_the_figures(
    bundle: tuple[Path, dict[str, Any]], quick: Forked, models: Path, tmp_path: Path
) -> None:
    out, document = bundle
    source, text = out.parent / "lstm.keras", out.parent / "held-out.txt"
    done = quick("verify", out, "--source", source, "--eval-text", text, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = {check["name"]: check["value"] for check in json.loads(done.stdout)["checks"]["litert"]}
    for name, check in figures(document).items():
        if check["value"] is not None:
            assert again[name] == pytest.approx(check["value"], rel=0.05), name
    assert (
        "not the model" in quick("verify", out, "--source", models / "transformer.keras", cwd=tmp_path).stderr
    )


@needs_tensorflow
def test_verify_notices_a_changed_code(
    bundle: tuple[Path, dict[str, Any]], tmp_path: Path, quick: Forked
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle[0], copy)
    file = copy / "litert" / "model.tflite"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert quick("verify", copy, cwd=tmp_path).returncode == 1
    assert quick("run", copy, "--prompt", "1 2", cwd=tmp_path).returncode == 1


@needs_tensorflow
def test_verify_with_the_source_notices_codes_that_the_manifest_vouches_for(
    bundle: tuple[Path, dict[str, Any]], tmp_path: Path, quick: Forked
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle[0], copy)
    file = copy / "litert" / "model.tflite"
    data = bytearray(file.read_bytes())
    before = sha256_file(file)
    data[-1] ^= 1
    file.write_bytes(data)
    manifest = (copy / "manifest.json").read_text().replace(before, sha256_file(file))
    (copy / "manifest.json").write_text(manifest)
    done = quick("verify", copy, "--source", bundle[0].parent / "lstm.keras", "--json", cwd=tmp_path)
    assert done.returncode == 1
    failed = [c["name"] for c in json.loads(done.stdout)["checks"]["litert"] if not c["passed"]]
    assert failed == ["stored_weights"]


@needs_tensorflow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("rows", ("stored_weights", "dense_1/kernel")),
        ("scale", ("stored_weights", "lowering_share", "lstm/lstm_cell/recurrent_kernel")),
        ("bias", ("lowering_share",)),
    ],
)
def test_a_faulty_file_does_not_pass(
    models: Path, tmp_path: Path, quick: Forked, fault: str, says: tuple[str, ...]
) -> None:
    options = ("--target", "host", "--out", "out", "--no-bench")
    done = quick(f"--fault={fault}", models / "lstm.keras", *options, cwd=tmp_path)
    message = refused(done, tmp_path, 1)
    assert all(part in message for part in says), message


@needs_tensorflow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("transformer.keras", (), {"agreement", "stored_weights"}),
        ("lstm", (), {"agreement", "stored_weights"}),
        ("any-length.keras", ("--context", str(TOKENS)), {"agreement", "padding"}),
        ("embedder.keras", (), {"cosine_min", "tensorflow_cosine_min"}),
        ("sparing", (), {"agreement", "tensorflow_agreement"}),
    ],
)
def test_other_models_pass_too(
    models: Path, tmp_path: Path, quick: Forked, name: str, options: tuple[str, ...], expected: set[str]
) -> None:
    _, document = exported(quick, models / name, tmp_path, "--no-bench", *options)
    assert document["passed"]
    assert figures(document).keys() >= expected
    assert figures(document)["lowering_share"]["value"] < 0.03
    assert document["passes"][0]["changed"] >= (2 if name == "sparing" else 5)


@needs_tensorflow
def test_a_model_that_padding_confuses_does_not_pass(models: Path, tmp_path: Path, quick: Forked) -> None:
    options = ("--target", "host", "--out", "out", "--context", "32", "--no-bench")
    message = refused(quick(models / "unmasked.keras", *options, cwd=tmp_path), tmp_path, 1)
    assert "padding" in message
    assert "mask_zero=True" in message


@needs_tensorflow
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("any-length.keras", (), ("any length", "--context")),
        ("lstm.keras", ("--context", "12"), ("inputs of 24 tokens, not of 12",)),
        ("lambda.keras", (), ("Lambda layer", "never executed")),
        ("text.keras", (), ("is text", "after the vectorization")),
        ("needy", (), ("MatrixDeterminant", "no operator")),
        ("broken.keras", (), ("broken.keras: Keras cannot read it", "save the model again")),
        ("no.keras", (), ("no.keras: no such file",)),
        ("old.h5", (), ("old HDF5 format", "model.save")),
        ("lstm.keras", ("--eval-text", "bad.txt"), ("bad.txt, line 2", "id 300 has no row")),
    ],
)
def test_a_model_that_cannot_be_exported(
    models: Path, tmp_path: Path, quick: Forked, name: str, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    (tmp_path / "bad.txt").write_text("1 2 3\n4 300\n")
    whole = (models / "lstm.keras").read_bytes()
    (models / "broken.keras").write_bytes(whole[: len(whole) // 2])
    message = refused(
        quick(models / name, "--target", "host", "--out", "out", *options, cwd=tmp_path), tmp_path
    )
    assert all(part in message for part in says), message


@needs_tensorflow
def test_a_tokenizer_beside_the_model_makes_it_read_text(
    models: Path, pycode: Path, tmp_path: Path, quick: Forked
) -> None:
    shutil.copy(models / "judge.keras", tmp_path)
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pycode / name, tmp_path / "tokenizer")
    (tmp_path / "labels.txt").write_text("bad\ngood\n")
    out, document = exported(quick, tmp_path / "judge.keras", tmp_path, "--no-bench")
    assert document["formats"][0]["quality"]["sentences"] > 50
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert not [note for note in document["notes"] if "made-up" in note]
    answered = json.loads(quick("run", out, "--prompt", "def f(x): return x", "--json", cwd=tmp_path).stdout)
    assert answered["label"] == ("good" if answered["scores"]["good"] >= 0.5 else "bad")
    (tmp_path / "labels.txt").write_text("bad\ngood\nugly\n")
    done = quick(tmp_path / "judge.keras", "--target", "host", "--out", "again", cwd=tmp_path)
    assert "labels.txt: 3 labels, but the model has 2 classes" in done.stderr


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(formats=("onnx",)), "written for litert only"),
        (Request(quantization=QuantizationOptions(bits=4)), "stored in 8 bits; leave --bits out"),
        (Request(quantization=QuantizationOptions(head_bits=16)), "leave --head-bits out"),
        (Request(quantization=QuantizationOptions(group_size=64)), "no meaning at 8 bits"),
        (Request(revision="main"), "no hub model"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(request_: Request, says: str) -> None:
    plan = make_plan(replace(request_, model="any.keras", target="host"))
    with pytest.raises(InputError, match=says):
        keras_export.export(plan, Progress(Console(quiet=True)))


def test_formats_of_other_runtimes_are_refused(tmp_path: Path, cli: Cli) -> None:
    options = ("--target", "host", "--out", "out", "--format", "executorch")
    assert "written for litert only" in refused(cli("any.keras", *options), tmp_path)


@pytest.mark.parametrize("columns", [(4, 6), (24,), (2, 3, 4)])
def test_a_constant_goes_back_to_where_it_came_from(columns: tuple[int, ...]) -> None:
    import torch

    from slm_export.exporters.litert_keras import Origin

    variable = np.arange(5 * 24, dtype=np.float32).reshape(5, *columns)
    for split in range(1, variable.ndim):
        for turned in (False, True):
            origin = Origin(variable.shape, split, turned)
            matrix = torch.from_numpy(np.ascontiguousarray(origin.matrix(variable)))
            assert torch.equal(origin.back(matrix), torch.from_numpy(variable))


def test_made_up_ids_cover_every_length_and_the_whole_table() -> None:
    from slm_export.keras.inputs import held_out

    inputs = held_out(None, None, 50, 16).inputs
    assert {len(ids) for ids in inputs} == set(range(1, 17))
    assert {token for ids in inputs for token in ids} == set(range(1, 50))
