"""Sparse matrices in Core ML packages: written, read back, executed, and every fault in them seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import families
import pytest
import torch
from conftest import Cli
from families import ids_of
from small_models import random_text

from slm_export.checkpoint import Checkpoint
from slm_export.compression.workbench import Workbench
from slm_export.exporters.coreml import CoreMLExporter
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.package import Package
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.sparsify import Sparsify
from slm_export.parity import differing, judge_codes, quantized_weights
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.weights import Dense, Quantized

TOKENS = ids_of(40)[0].tolist()
SCALED, SPREAD = "constexpr_sparse_blockwise_shift_scale", "constexpr_sparse_to_dense"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@dataclass(frozen=True)
class Exported:
    checkpoint: Checkpoint
    path: Path

    @property
    def sparse(self) -> dict[str, Quantized | Dense]:
        """The linear layers."""
        return {n: w for n, w in self.checkpoint.weights.items() if self.checkpoint.roles[n] == "linear"}  # type: ignore[misc]


def export(family: str, bits: int, step: Sparsify | None, folder: Path) -> Exported:
    families.save((families.DECODERS | families.ENCODERS)[family], folder)
    source = load_checkpoint(folder)
    if step is not None:
        source = step.run(source, Workbench(calibration=random_text())).checkpoint
    quantize = GroupQuantize(bits=bits, embedding_bits=max(8, bits))  # type: ignore[arg-type]
    made = Exported(quantize.run(source).checkpoint, folder / "Model.mlpackage")
    CoreMLExporter().write(made.checkpoint, ExportOptions(context=64, stop_ids=(2,), bos_id=1), made.path)
    return made


EIGHT = "int8 decoder"
CASES = {
    "int4 decoder": ("gemma", 4, Sparsify(0.75, 4)),
    EIGHT: ("gemma", 8, Sparsify(0.5)),
    "fp16 encoder": ("bert, classes", 16, Sparsify(0.5, 2, "wanda")),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return cache(lambda name: export(*CASES[name], tmp_path_factory.mktemp("made")))


@pytest.fixture
def made(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


each = pytest.mark.parametrize(
    "made",
    [EIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != EIGHT)],
    indirect=True,
)


@each
def test_codes_come_back_and_the_program_computes_with_them(made: Exported) -> None:
    exporter = CoreMLExporter()
    assert not differing(exporter.stored(made.path), quantized_weights(made.checkpoint))
    (check,) = exporter.own_checks(made.path, made.checkpoint, TOKENS)
    assert check.passed
    for function in Package.open(made.path).functions.values():
        spread = [operation for operation in function.operations if operation.kind == SPREAD]
        assert len(spread) == len(made.sparse)


@each
def test_a_mask_and_what_is_left_is_all_that_is_stored(made: Exported) -> None:
    """One bit for each value, and the bits of those that are not 0; scales beside them."""
    expected = 0
    for weight in made.sparse.values():
        values = weight.codes() if isinstance(weight, Quantized) else weight.float32().half()
        bits = weight.bits if isinstance(weight, Quantized) else 16
        left = int((values != 0).sum())
        expected += -(-weight.count // 8) + -(-left * bits // 8)
        expected += 2 * weight.scales.numel() if isinstance(weight, Quantized) else 0
    function = next(iter(Package.open(made.path).functions.values()))
    stored = {
        id(part): part.data.numel()
        for operation in function.operations
        if operation.kind in (SCALED, SPREAD)
        for operand in operation.inputs.values()
        for part in operand
        if isinstance(part, Packed)
    }
    assert sum(stored.values()) == expected
    assert expected < 0.75 * sum(weight.bytes for weight in made.sparse.values())


@each
def test_coremltools_reads_the_same_matrices(made: Exported, tmp_path: Path) -> None:
    """Its own loader and its own operators, on a copy: it rewrites the manifest of what it opens."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    copy = shutil.copytree(made.path, tmp_path / "Model.mlpackage")
    opened = coremltools.models.MLModel(str(copy), skip_model_load=True)
    program = load(opened.get_spec(), opened.get_spec().specificationVersion, opened.weights_dir)
    names = json.loads(Package.open(made.path).metadata["slm_export.weights"])
    for function in program.functions.values():
        found = {names[op.outputs[0].name]: op for op in function.operations if op.op_type == SPREAD}
        assert found.keys() == made.sparse.keys()
        for name, operation in found.items():
            values = torch.from_numpy(operation.materialized_val_inference())
            assert torch.equal(values, made.sparse[name].float32().half()), name


@pytest.mark.slow
def test_a_matrix_that_nobody_made_sparse_has_no_mask(tmp_path: Path) -> None:
    dense = export("gemma", 4, None, tmp_path)
    functions = Package.open(dense.path).functions.values()
    assert not any(operation.kind == SPREAD for function in functions for operation in function.operations)


def other_mask(parts: dict[str, bytes]) -> dict[str, bytes]:
    """Two rows have each other's places: as many values, elsewhere."""
    mask, width = parts["data_mask"], 64 // 8
    return {"data_mask": mask[width : 2 * width] + mask[:width] + mask[2 * width :]}


def other_values(parts: dict[str, bytes]) -> dict[str, bytes]:
    """Two neighbours that are not 0 have changed places."""
    left = parts["nonzero_data"]
    return {"nonzero_data": left[1::-1] + left[2:]}


def other_scales(parts: dict[str, bytes]) -> dict[str, bytes]:
    """Two rows have each other's scale."""
    scale = parts["scale"]
    return {"scale": scale[2:4] + scale[:2] + scale[4:]}


@pytest.mark.parametrize("fault", [other_mask, other_values, other_scales], ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_both_checks(
    fault: Callable[[dict[str, bytes]], dict[str, bytes]], exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    eight = exports(EIGHT)
    path = shutil.copytree(eight.path, tmp_path / "Model.mlpackage")
    operations = Package.open(path).functions["decode"].operations
    operation = next(op for op in operations if op.kind == SCALED and op.outputs[0][1].shape == (128, 64))
    parts = {
        key: part.data.numpy().tobytes()
        for key, operand in operation.inputs.items()
        for part in operand
        if isinstance(part, Packed)
    }
    data = (path / WEIGHTS).read_bytes()
    for key, changed in fault(parts).items():
        assert data.count(parts[key]) == 1
        assert changed != parts[key]
        assert len(changed) == len(parts[key])
        data = data.replace(parts[key], changed)
    (path / WEIGHTS).write_bytes(data)
    exporter = CoreMLExporter()
    codes = judge_codes(exporter.stored(path), quantized_weights(eight.checkpoint))
    (exact,) = exporter.own_checks(path, eight.checkpoint, TOKENS)
    assert not codes.passed
    assert not exact.passed


PROFILE = """
schema  = 1
name    = "sparse"
title   = "A sparse model"
target  = "linux"
formats = ["coreml"]
context = 256

[memory]
total_gb = { value = 8, source = "made up for a test" }

[[recipe]]
pass = "sparsify"

[[recipe]]
pass           = "group-quantize"
bits           = 8
embedding_bits = 8

[gates]
max_kl_mean          = 0.2
min_top1_agreement   = 0.7
max_perplexity_ratio = 1.3
min_greedy_agreement = 0.3
"""


@pytest.mark.slow
def test_a_sparse_model_goes_all_the_way(pycode: Path, tmp_path: Path, cli: Cli) -> None:
    profile, out = tmp_path / "sparse.toml", tmp_path / "out"
    profile.write_text(PROFILE)
    made = cli(pycode, "--device", profile, "--no-bench", "--out", out, "--json", timeout=900)
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert any(note.startswith("sparsify: 50% of 4,718,592 values are 0") for note in report["notes"])
    (written,) = report["formats"]
    linear, vocabulary = 4_718_592, 4096 * 256
    # A bit for each value of a linear layer and 8 for every second, 8 for each of the vocabulary. Scales and program
    # come on top; a little less is left where values that stayed are rounded to 0.
    weights = linear * 5 // 8 + vocabulary
    assert 0.98 * weights < written["artifact"]["bytes"] < 1.15 * weights
