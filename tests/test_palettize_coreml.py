"""Tables in Core ML packages: written, read back, executed, and every fault in them seen."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import ids_of

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.coreml import CoreMLExporter
from slm_export.exporters.coreml_accelerator_rules import GPU, NEURAL_ENGINE
from slm_export.exporters.coreml_exact import LIMIT, judge_exact
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.program import Name
from slm_export.optimizers.palettize import Palettize
from slm_export.parity import differing, judge_codes, quantized_weights
from slm_export.profile import CoreML
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.weights import Dense, Palettized, Quantized

CONTEXT = 64
TOKENS = ids_of(40)[0].tolist()
TABLES = "constexpr_lut_to_dense"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@dataclass(frozen=True)
class Exported:
    source: Checkpoint
    checkpoint: Checkpoint
    path: Path

    @property
    def tables(self) -> dict[str, Palettized]:
        return {name: w for name, w in self.checkpoint.weights.items() if isinstance(w, Palettized)}


def export(family: str, step: Palettize, folder: Path, asked: CoreML) -> Exported:
    families.save((families.DECODERS | families.ENCODERS)[family], folder)
    source = load_checkpoint(folder)
    made = Exported(source, step.run(source).checkpoint, folder / "Model.mlpackage")
    options = ExportOptions(context=CONTEXT, stop_ids=(2,), bos_id=1, coreml=asked)
    CoreMLExporter().write(made.checkpoint, options, made.path)
    return made


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tied decoder as the Neural Engine wants it: listed lengths, tables of 4 bits, and of 6 for the vocabulary."""
    step = Palettize(4, embedding_bits=6)
    return export("gemma", step, tmp_path_factory.mktemp("decoder"), CoreML(query_lengths=(1, 16)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    step = Palettize(6, group_channels=0)
    return export("bert, classes", step, tmp_path_factory.mktemp("encoder"), CoreML(ios=17))


@pytest.fixture
def made(request: pytest.FixtureRequest, name: str) -> Exported:
    found: Exported = request.getfixturevalue(name)
    return found


both = pytest.mark.parametrize("name", ["decoder", "encoder"])


def matrix(source: Checkpoint, name: str, weight: Palettized) -> torch.Tensor:
    """Return the entry nearest to each value of the source: knows tables, but nothing of packed indices."""
    tables = weight.tables.float().repeat_interleave(weight.group, dim=0)
    values = source.weights[name].float32()
    nearest = torch.stack([(values - entry.unsqueeze(1)).abs() for entry in tables.unbind(1)]).argmin(0)
    return tables.gather(1, nearest)


def half(values: torch.Tensor) -> Dense:
    return Dense(tuple(values.shape), torch.float16, lambda: values.half())


@both
def test_indices_and_tables_are_read_back_bit_for_bit(made: Exported) -> None:
    stored, expected = CoreMLExporter().stored(made.path), quantized_weights(made.checkpoint)
    assert len(made.tables) > 10
    assert not differing(stored, expected)
    for name, weight in made.tables.items():
        found = stored[name]
        assert isinstance(found, Palettized)
        assert (found.shape, found.bits, found.group) == (weight.shape, weight.bits, weight.group)
        assert torch.equal(found.packed, weight.packed)
        assert torch.equal(found.tables.view(torch.int16), weight.tables.view(torch.int16))


@both
def test_the_program_computes_with_the_nearest_entries(made: Exported) -> None:
    """Beside a model whose matrices are plain floats, looked up one by one."""
    values = {name: matrix(made.source, name, weight) for name, weight in made.tables.items()}
    dense = {name: half(floats) for name, floats in values.items()}
    assert judge_exact(made.path, made.checkpoint.with_weights(dense), TOKENS).passed
    (check,) = CoreMLExporter().own_checks(made.path, made.checkpoint, TOKENS)
    assert check.passed
    name = next(name for name in dense if name.endswith(("down_proj.weight", "output.dense.weight")))
    dense[name] = half(values[name].flip(0))
    other = judge_exact(made.path, made.checkpoint.with_weights(dense), TOKENS)
    assert other.value is not None
    assert other.value > 10 * LIMIT


@both
def test_coremltools_reads_the_same_matrices(made: Exported, tmp_path: Path) -> None:
    """Its own loader and its own operators, on a copy: it rewrites the manifest of what it opens."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    copy = shutil.copytree(made.path, tmp_path / "Model.mlpackage")
    opened = coremltools.models.MLModel(str(copy), skip_model_load=True)
    program = load(opened.get_spec(), opened.get_spec().specificationVersion, opened.weights_dir)
    names = json.loads(Package.open(made.path).metadata["slm_export.weights"])
    for function in program.functions.values():
        found = {names[op.outputs[0].name]: op for op in function.operations if op.op_type == TABLES}
        assert found.keys() == made.tables.keys()
        for name, operation in found.items():
            values = torch.from_numpy(operation.materialized_val_inference()).float()
            assert torch.equal(values, matrix(made.source, name, made.tables[name])), name


def test_a_tied_vocabulary_is_stored_once(decoder: Exported) -> None:
    vocabulary = decoder.checkpoint.tied["lm_head.weight"]
    assert decoder.tables[vocabulary].bits == 6
    for function in Package.open(decoder.path).functions.values():
        tables = [op for op in function.operations if op.kind == TABLES]
        assert len(tables) == len(decoder.tables)
        (table,) = (op for op in tables if op.outputs[0][1].shape == decoder.tables[vocabulary].shape)
        uses = [
            op.kind for op in function.operations if Name(table.outputs[0][0]) in sum(op.inputs.values(), ())
        ]
        assert sorted(uses) == ["gather", "linear"]
    assert (decoder.path / WEIGHTS).stat().st_size < 1.3 * decoder.checkpoint.bytes


def test_tables_for_listed_lengths_are_for_the_neural_engine(decoder: Exported) -> None:
    found = CoreMLExporter().delegation(decoder.path)
    assert found.units == {NEURAL_ENGINE: 1, GPU: 1}
    assert found.delegate.startswith(NEURAL_ENGINE)
    assert found.memory is not None
    compressed = [weight for weight in decoder.checkpoint.weights.values() if not isinstance(weight, Dense)]
    saved = sum(2 * weight.count - weight.bytes for weight in compressed)
    assert found.memory.expanded_bytes - found.memory.packed_bytes == saved


def test_ios_17_has_no_table_per_group(encoder: Exported, tmp_path: Path) -> None:
    assert Package.open(encoder.path).minimum == 8
    assert {type(weight) for weight in encoder.checkpoint.weights.values()} == {Dense, Palettized, Quantized}
    grouped = Palettize(6).run(encoder.source).checkpoint
    options = ExportOptions(context=CONTEXT, coreml=CoreML(ios=17))
    with pytest.raises(InputError, match=r"a table per 16 rows needs iOS 18; give group_channels = 0"):
        CoreMLExporter().write(grouped, options, tmp_path / "Model.mlpackage")


def parts(package: Path) -> tuple[bytes, bytes]:
    """Return indices and tables of a feed-forward matrix, as they lie in the weight file."""
    operations = Package.open(package).functions["decode"].operations
    (first, *_) = (op for op in operations if op.kind == TABLES and op.outputs[0][1].shape == (128, 64))
    indices, lut = (first.inputs[key][0].data.numpy().tobytes() for key in ("indices", "lut"))  # type: ignore[union-attr]
    return indices, lut


def swapped_tables(data: bytes, indices: bytes, lut: bytes) -> bytes:
    """Two groups of rows have each other's table."""
    return data.replace(lut, lut[32:64] + lut[:32] + lut[64:])


def swapped_indices(data: bytes, indices: bytes, lut: bytes) -> bytes:
    """The order of the two indices in a byte is the other."""
    turned = bytes((byte >> 4 | byte << 4) & 0xFF for byte in indices)
    return data.replace(indices, turned)


def turned_table(data: bytes, indices: bytes, lut: bytes) -> bytes:
    """One table begins with its largest entry."""
    first = [lut[at : at + 2] for at in range(0, 32, 2)]
    return data.replace(lut, b"".join(reversed(first)) + lut[32:])


@pytest.mark.parametrize("fault", [swapped_tables, swapped_indices, turned_table], ids=lambda f: f.__name__)
def test_a_fault_is_caught_by_both_checks(fault: Any, decoder: Exported, tmp_path: Path) -> None:
    path = shutil.copytree(decoder.path, tmp_path / "Model.mlpackage")
    data = (path / WEIGHTS).read_bytes()
    changed = fault(data, *parts(path))
    assert len(changed) == len(data)
    assert changed != data
    (path / WEIGHTS).write_bytes(changed)
    exporter = CoreMLExporter()
    codes = judge_codes(exporter.stored(path), quantized_weights(decoder.checkpoint))
    (exact,) = exporter.own_checks(path, decoder.checkpoint, TOKENS)
    assert not codes.passed
    assert "differ from the checkpoint" in codes.detail
    assert not exact.passed


def test_functions_with_different_tables_are_refused(decoder: Exported, tmp_path: Path) -> None:
    from coremltools.proto import Model_pb2

    path = shutil.copytree(decoder.path, tmp_path / "Model.mlpackage")
    spec = Model_pb2.Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    function = spec.mlProgram.functions["decode"]
    operations = function.block_specializations[function.opset].operations
    one, other = [
        op
        for op in operations
        if op.type == TABLES and op.outputs[0].type.tensorType.dimensions[0].constant.size == 128
    ][:2]
    one.inputs["lut"].CopyFrom(other.inputs["lut"])
    (path / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(InputError, match="its functions have different weights for"):
        CoreMLExporter().stored(path)


def test_tables_of_another_kind_are_refused(decoder: Exported, tmp_path: Path) -> None:
    """A table for each half of the columns is none of ours."""
    from coremltools.proto import Model_pb2

    path = shutil.copytree(decoder.path, tmp_path / "Model.mlpackage")
    spec = Model_pb2.Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    for function in spec.mlProgram.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            if operation.type == TABLES:
                sizes = operation.inputs["lut"].arguments[0].value.type.tensorType.dimensions
                sizes[0].constant.size, sizes[1].constant.size = sizes[0].constant.size // 2, 2
    (path / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(InputError, match="not one of 16 or 64 float16 values for each group of rows"):
        CoreMLExporter().stored(path)
