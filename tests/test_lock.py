"""A lock file holds an export fast: what drifted is named before any work, other bytes are refused, the same passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from slm_export.budget.budget import Budget
from slm_export.bundles.bundle import verify_files
from slm_export.bundles.lock import LOCK, Inputs, Lock, Platform, Source, differences, read_lock, write_lock
from slm_export.compilation import Request, make_plan
from slm_export.errors import GateError, InputError
from slm_export.gates import Gates
from slm_export.locked import Accepted, inputs_of, lock_of
from slm_export.quantization_options import QuantizationOptions
from slm_export.results import Artifact, written

SHA = "ab" * 32
TOOLS = {"slm-export": "0.1.0", "torch": "2.13.0"}
REQUEST = Request(model="model", target="host", formats=("executorch",))
PROFILE = 'schema = 1\nname = "mine"\ntitle = "%s"\ntarget = "host"\nformats = ["executorch"]\n'
CALIBRATED = PROFILE % "Mine" + '[[recipe]]\npass = "gptq"\nbits = 4\ngroup = 32\n'
# Floats lower faster than integers.
FAST = ("--target", "host", "--bits", "32", "--no-verify", "--no-bench")


def made_of(request: Request, toolchain: dict[str, str] = TOOLS, **known: str) -> Inputs:
    source = Source(**{"sha256": SHA, "revision": request.revision, **known})
    plan = make_plan(request)
    return inputs_of(plan, plan.recipe, toolchain, source)


# --- what drifted is named ---------------------------------------------------------------------------


def test_the_same_inputs_have_no_difference(tmp_path: Path) -> None:
    lock = Lock(inputs=made_of(REQUEST), platform=Platform(system="Linux", machine="x86_64"), artifacts={})
    write_lock(tmp_path, lock)
    assert read_lock(tmp_path / LOCK) == lock
    assert differences(read_lock(tmp_path / LOCK).inputs, made_of(REQUEST)) == ()


@pytest.mark.parametrize(
    ("toolchain", "line"),
    [
        ({**TOOLS, "torch": "2.12.0"}, "torch: locked 2.13.0, installed 2.12.0"),
        ({"slm-export": "0.1.0"}, "torch: locked 2.13.0, installed none"),
        ({**TOOLS, "onnx": "1.20"}, "onnx: locked none, installed 1.20"),
        ({**TOOLS, "slm-export": "0.2.0"}, "slm-export: locked 0.1.0, installed 0.2.0"),
    ],
)
def test_another_tool_is_named(toolchain: dict[str, str], line: str) -> None:
    assert differences(made_of(REQUEST), made_of(REQUEST, toolchain)) == (line,)


def test_another_python_is_named() -> None:
    here = made_of(REQUEST)
    there = here.model_copy(update={"toolchain": {**here.toolchain, "python": "3.9"}})
    (line,) = differences(there, here)
    assert line == f"python: locked 3.9, installed {here.toolchain['python']}"


def test_another_model_is_named() -> None:
    assert differences(made_of(REQUEST), made_of(REQUEST, sha256="cd" * 32)) == (
        "the model's files: locked abababababab, now cdcdcdcdcdcd",
    )
    assert differences(made_of(REQUEST), made_of(replace(REQUEST, revision="main"))) == (
        "the model's revision: locked none, now main",
    )
    assert differences(made_of(REQUEST), made_of(REQUEST, licences=SHA)) == (
        "the model's licence: locked none, now abababababab",
    )


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            {"quantization": QuantizationOptions(bits=4, group_size=64)},
            ["recipe[0].group: locked 32, now 64"],
        ),
        ({"context": 128}, ["context: locked none, now 128"]),
        ({"formats": ("executorch", "onnx")}, ["formats: locked executorch, now executorch, onnx"]),
        ({"gates": Gates(max_kl_mean=0.5)}, ["gates.max_kl_mean: locked none, now 0.5"]),
        ({"verify": False}, ["whether fidelity is verified: locked true, now false"]),
    ],
)
def test_another_request_is_named(change: dict[str, Any], lines: list[str]) -> None:
    locked = made_of(replace(REQUEST, quantization=QuantizationOptions(bits=4, group_size=32)))
    now = {"quantization": QuantizationOptions(bits=4, group_size=32), **change}
    assert list(differences(locked, made_of(replace(REQUEST, **now)))) == lines


def test_another_profile_and_its_passes_are_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    request = replace(REQUEST, target=None, device=str(mine))

    def inputs(text: str) -> Inputs:
        mine.write_text(text)
        return made_of(request)

    locked, titled, calibrated = inputs(PROFILE % "Mine"), inputs(PROFILE % "Other"), inputs(CALIBRATED)
    (line,) = differences(locked, titled)
    assert line.startswith("the device profile: locked ")
    assert differences(locked, calibrated)[1:] == ("recipe: locked none, now gptq",)


def test_other_texts_are_named(tmp_path: Path) -> None:
    device, text, other = (tmp_path / name for name in ("mine.toml", "text", "other"))
    device.write_text(CALIBRATED)
    text.write_text("one")
    other.write_text("two")
    request = replace(REQUEST, target=None, device=str(device))
    plain = made_of(request)
    for option, name in (("eval_text", "evaluation"), ("calibration", "calibration")):
        one, two = (made_of(replace(request, **{option: path})) for path in (text, other))  # type: ignore[arg-type]
        (line,) = differences(one, two)
        assert line.startswith(f"the {name} text: locked 7692c3ad3540, now ")
        (line,) = differences(one, plain)
        assert line == f"the {name} text: locked 7692c3ad3540, now none"
    with pytest.raises(InputError, match="missing: cannot be read"):
        made_of(replace(request, calibration=tmp_path / "missing"))


def test_a_budget_is_not_held_against_a_lock(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out the budget"):
        make_plan(replace(REQUEST, budget=Budget(max_size=10**6), locked=tmp_path / LOCK))


# --- files that are no lock --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suprise": 1}, r"unknown key 'suprise'; known: artifacts, inputs, platform, schema"),
        ({"artefacts": {}}, r"unknown key 'artefacts'; did you mean 'artifacts'\?"),
        ({"schema": 2}, "lock schema 2 is not one"),
        ({"inputs": {}}, r"inputs\.toolchain: Field required"),
        ({"artifacts": {"onnx": {"../model.onnx": SHA}}}, "does not stay inside the bundle"),
        ({"artifacts": {"onnx": {"model.onnx": "12"}}}, "should match pattern"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    lock = Lock(inputs=made_of(REQUEST), platform=Platform(system="Linux", machine="x86_64"), artifacts={})
    path = write_lock(tmp_path, lock)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        read_lock(path)


def test_an_unknown_key_inside_is_refused(tmp_path: Path) -> None:
    lock = Lock(inputs=made_of(REQUEST), platform=Platform(system="Linux", machine="x86_64"), artifacts={})
    path = write_lock(tmp_path, lock)
    data = json.loads(path.read_text())
    data["inputs"]["text"]["calibratoin"] = SHA
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"'inputs\.text\.calibratoin'; did you mean 'calibration'\?"):
        read_lock(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"schema = 1", b"\xff"])
def test_a_file_that_is_no_lock_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(InputError, match=r"slm-export\.lock: (not valid JSON|lock schema None)"):
        read_lock(tmp_path / LOCK)


def test_no_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file or directory; export without --locked, and copy"):
        read_lock(tmp_path / LOCK)
    with pytest.raises(InputError, match="put MODEL before --locked"):
        read_lock(tmp_path)


# --- other bytes -------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "onnx").mkdir()
    model, data = tmp_path / "onnx" / "model.onnx", tmp_path / "onnx" / "model.onnx.data"
    model.write_bytes(b"graph")
    data.write_bytes(b"weights")
    return written(model, "onnx", 10, (), (data,))


def test_other_bytes_are_refused_whichever_file_has_them(tmp_path: Path, artifact: Artifact) -> None:
    lock = lock_of(made_of(REQUEST), (artifact,), tmp_path)
    accepted = Accepted(Path(LOCK), lock)
    assert list(lock.artifacts["onnx"]) == ["onnx/model.onnx", "onnx/model.onnx.data"]
    assert accepted.refuse_other_bytes((artifact,), tmp_path) == ()
    artifact.data[0].write_bytes(b"WEIGHTS")
    with pytest.raises(GateError, match=r"onnx/model\.onnx\.data: locked [0-9a-f]{12}, made [0-9a-f]{12}\n"):
        accepted.refuse_other_bytes((artifact,), tmp_path)
    with pytest.raises(GateError, match=r"onnx/model\.onnx\.data: locked [0-9a-f]{12}, made none\n"):
        accepted.refuse_other_bytes((replace(artifact, data=()),), tmp_path)


def test_bytes_of_another_platform_are_not_compared_and_that_is_said(
    tmp_path: Path, artifact: Artifact
) -> None:
    lock = lock_of(made_of(REQUEST), (artifact,), tmp_path)
    elsewhere = Platform(system="Darwin", machine="arm64", vectors="DEFAULT")
    accepted = Accepted(Path(LOCK), lock.model_copy(update={"platform": elsewhere}))
    artifact.data[0].write_bytes(b"WEIGHTS")
    (note,) = accepted.refuse_other_bytes((artifact,), tmp_path)
    assert note.startswith(f"slm-export.lock: locked on Darwin arm64 DEFAULT, and this is {lock.platform}: ")


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tiny_llama: Path, quick_cli: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an accepted lock file, and the bundle that it is of."""
    folder = tmp_path_factory.mktemp("project")
    done = quick_cli(tiny_llama, *FAST, "--out", "first", cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copy(folder / "first" / LOCK, folder)
    return folder


@pytest.fixture
def export(tiny_llama: Path, quick_cli: Forked, project: Path) -> Callable[..., Any]:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return quick_cli(tiny_llama, *FAST, "--out", "second", *options, cwd=project)

    return run


def changed(project: Path, change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads((project / LOCK).read_text())
    change(data)
    (project / "other.lock").write_text(json.dumps(data))
    return "other.lock"


def test_a_locked_export_gives_the_same_bytes(project: Path, export: Callable[..., Any]) -> None:
    done = export("--locked", "--json")
    assert done.returncode == 0, done.stderr
    assert verify_files(project / "second") == ()
    for name in (LOCK, "executorch/model.pte"):
        assert (project / "first" / name).read_bytes() == (project / "second" / name).read_bytes(), name
    assert not any("not compared" in note for note in json.loads(done.stdout)["notes"])
    shutil.rmtree(project / "second")


def test_all_that_drifted_is_named_before_any_work(project: Path, export: Callable[..., Any]) -> None:
    def drift(data: dict[str, Any]) -> None:
        data["inputs"]["toolchain"]["torch"] = "2.12.0"
        data["inputs"]["source"]["sha256"] = SHA

    done = export("--locked", changed(project, drift), "--context", "32")
    assert done.returncode == 2, done.stderr
    assert "other.lock: not what was locked\n" in done.stderr
    for line in (
        "torch: locked 2.12.0, installed ",
        "files: locked abababababab",
        "context: locked none, now 32",
    ):
        assert line in done.stderr
    assert "read the model" not in done.stderr
    assert not (project / "second").exists()


def test_an_artifact_with_other_bytes_is_not_kept(project: Path, export: Callable[..., Any]) -> None:
    def other(data: dict[str, Any]) -> None:
        data["artifacts"]["executorch"]["executorch/model.pte"] = SHA

    before = sorted(os.listdir(project))
    done = export("--locked", changed(project, other))
    assert done.returncode == 1, done.stderr
    assert "executorch/model.pte: locked abababababab, made " in done.stderr
    assert "nothing of it was kept" in done.stderr
    assert sorted(os.listdir(project)) == sorted({*before, "other.lock"})
