"""What is read back from a program is the checkpoint, bit for bit; a changed byte is seen, and where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import families
import pytest
import torch

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.exporters.executorch_stand_in import constants_of
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint
from slm_export.weights import Quantized

BITS_8 = GroupQuantize(bits=8, embedding_bits=8, search=False)
BITS_4 = GroupQuantize(bits=4, group=64, embedding_bits=4, search=False)
MIXED = GroupQuantize(bits=4, group=32, embedding_bits=4, head_bits=8, search=False)


@dataclass(frozen=True)
class Exported:
    path: Path
    weights: Mapping[str, Quantized]

    def changed(self, folder: Path, old: bytes, at: int, mask: int) -> Path:
        """Return a copy of the file with one byte changed, in the bytes that are there once."""
        file = bytearray(self.path.read_bytes())
        assert file.count(old) == 1
        file[file.index(old) + at] ^= mask
        copy = folder / "changed.pte"
        copy.write_bytes(file)
        return copy


Make = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exported(pycode: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return what exports a model once."""
    folder = tmp_path_factory.mktemp("reader")
    name, config, options = families.DECODERS["qwen-2.5"]
    # Of one layer, which is lowered whole.
    families.save((name, config, {**options, "num_hidden_layers": 1}), folder / "untied")
    three = shallow(pycode, 3, folder / "pycode")
    models = {
        "stamped, tied, 8 bits": (three, BITS_8),
        "stamped, tied, 4 bits": (three, BITS_4),
        "whole, untied, mixed": (folder / "untied", MIXED),
        "encoder": (shallow(minilm, 1, folder / "minilm"), BITS_8),
    }
    made: dict[str, Exported] = {}

    def make(model: str) -> Exported:
        if model not in made:
            source, recipe = models[model]
            checkpoint = recipe.run(load_checkpoint(source)).checkpoint
            assert bool(checkpoint.tied) == ("tied" in model.split(", "))
            path = folder / f"{len(made)}.pte"
            families.exported(checkpoint, path)
            made[model] = Exported(path, quantized(checkpoint))
        return made[model]

    return make


def shallow(model: Path, layers: int, folder: Path) -> Path:
    """Return a copy of a model that ends after so many of its layers, to be lowered sooner."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.chmod(0o644)
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": layers}))
    return folder


def quantized(checkpoint: Checkpoint) -> Mapping[str, Quantized]:
    return {name: w for name, w in checkpoint.weights.items() if isinstance(w, Quantized)}


def stored(path: Path) -> Mapping[str, Quantized]:
    return ExecuTorchExporter().stored(path)


def same(one: Quantized, other: Quantized) -> bool:
    form = (one.shape, one.bits, one.group) == (other.shape, other.bits, other.group)
    kinds = [[part.dtype for part in weight.load()] for weight in (one, other)]
    return form and kinds[0] == kinds[1] and all(map(torch.equal, one.load(), other.load()))


def differing(path: Path, weights: Mapping[str, Quantized]) -> list[str]:
    found = stored(path)
    assert found.keys() == weights.keys()
    return [name for name, weight in weights.items() if not same(found[name], weight)]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("stamped, tied, 8 bits", 3 * 7 + 1),
        ("stamped, tied, 4 bits", 3 * 7 + 1),
        ("whole, untied, mixed", 7 + 2),
        ("encoder", 6 + 3),
    ],
)
def test_a_program_is_read_back_bit_for_bit(model: str, count: int, exported: Make) -> None:
    program = exported(model)
    assert len(program.weights) == count
    assert differing(program.path, program.weights) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("stamped, tied, 8 bits", "model.layers.2.mlp.up_proj.weight"),
        ("stamped, tied, 8 bits", "model.embed_tokens.weight"),
        ("stamped, tied, 4 bits", "model.layers.2.self_attn.k_proj.weight"),
        ("whole, untied, mixed", "model.embed_tokens.weight"),
        ("whole, untied, mixed", "lm_head.weight"),
        ("encoder", "encoder.layer.0.output.dense.weight"),
        ("encoder", "embeddings.position_embeddings.weight"),
    ],
)
def test_one_changed_code_is_seen(model: str, name: str, exported: Make, tmp_path: Path) -> None:
    program = exported(model)
    weight = program.weights[name]
    codes = weight.codes().flatten()
    place = next(i for i in range(len(codes) // 2, len(codes)) if 0 < codes[i] < 6)
    _, data = next(constants_of(weight))
    # Of two in a byte, the even column is the low one.
    mask = 1 if weight.bits == 8 or place % 2 == 0 else 1 << 4
    path = program.changed(tmp_path, data, place * weight.bits // 8, mask)
    assert differing(path, program.weights) == [name]
    found = stored(path)[name]
    assert torch.equal(found.scales, weight.scales)
    assert (found.codes().flatten() != codes).nonzero().flatten().tolist() == [place]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("stamped, tied, 8 bits", "model.layers.2.mlp.up_proj.weight"),
        ("stamped, tied, 4 bits", "model.layers.2.self_attn.k_proj.weight"),
        ("encoder", "embeddings.word_embeddings.weight"),
    ],
)
def test_one_changed_scale_is_seen(model: str, name: str, exported: Make, tmp_path: Path) -> None:
    program = exported(model)
    weight = program.weights[name]
    _, (_, data) = constants_of(weight)
    width = 4 if weight.bits == 8 else 2
    # The last bit that a bfloat16 has.
    path = program.changed(tmp_path, data, 5 * width + width - 2, 1)
    assert differing(path, program.weights) == [name]
    found = stored(path)[name]
    assert torch.equal(found.packed, weight.packed)
    assert (found.scales != weight.scales).flatten().nonzero().flatten().tolist() == [5]


def test_a_tied_vocabulary_must_be_the_same_in_both_places(exported: Make, tmp_path: Path) -> None:
    program = exported("stamped, tied, 4 bits")
    name = "model.embed_tokens.weight"
    scales = program.weights[name].scales
    # The look-up has them in float16, the head in bfloat16.
    for form in (torch.float16, torch.bfloat16):
        data = scales.to(form).view(torch.uint8).numpy().tobytes()
        found = stored(program.changed(tmp_path, data, 8, 8))
        with pytest.raises(InputError, match=rf"{name} is stored twice, with different values; export"):
            found[name].load()


def test_what_is_not_on_the_grid_is_refused(exported: Make, tmp_path: Path) -> None:
    program = exported("stamped, tied, 8 bits")
    name = "model.layers.0.mlp.down_proj.weight"
    (_, codes), (_, scales) = constants_of(program.weights[name])
    least = program.changed(tmp_path, codes, 100, codes[100] ^ 0x80)  # -128, which has no opposite
    with pytest.raises(InputError, match=f"{name} is not on the grid: it has a code -128"):
        stored(least)[name].load()
    finer = program.changed(tmp_path, scales, 0, 1)
    with pytest.raises(InputError, match=f"{name} is not on the grid: it has a scale"):
        stored(finer)[name].load()


def test_values_are_read_when_they_are_asked_for(exported: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(exported("whole, untied, mixed").path.read_bytes())
    found = stored(path)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        found["lm_head.weight"].load()


def test_a_program_without_names_is_to_be_exported_again(exported: Make, tmp_path: Path) -> None:
    """As those are that were written before there were names."""
    old = exported("whole, untied, mixed").changed(tmp_path, b"slm_export.weights", 0, 1)
    with pytest.raises(InputError, match="does not tell the names of its weights; export the model again"):
        stored(old)


def test_a_foreign_program_is_refused(tmp_path: Path) -> None:
    from executorch.exir import to_edge

    graph = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    path = tmp_path / "foreign.pte"
    path.write_bytes(to_edge(graph).to_executorch().buffer)
    with pytest.raises(InputError, match=r"foreign\.pte: its weights cannot be read: it does not tell"):
        stored(path)


@pytest.mark.parametrize("content", [b"", b"not a program of ExecuTorch at all, but long enough to be one"])
def test_what_is_no_program_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no ExecuTorch program; export the model again"):
        stored(path)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(share: float, exported: Make, tmp_path: Path) -> None:
    program = exported("stamped, tied, 8 bits")
    content = program.path.read_bytes()
    path = tmp_path / "model.pte"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="export the model again"):
        differing(path, program.weights)
