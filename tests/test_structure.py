"""Pruned models are the models with the removed parts silenced; the same holds for every family that a pass claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import normal
from families import DECODERS, ENCODERS, VOCABULARY, apart, chosen, ids_of, save
from torch import Tensor

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.calibration import Calibration
from slm_export.compression.depth import with_layers
from slm_export.compression.geometry import Parts, attentions, mlps
from slm_export.compression.moments import refit
from slm_export.compression.narrowing import allocate, contributions
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.recipe import make_pass, unaccounted
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import GENERATION
from slm_export.weights import Dense

FAMILIES = {**DECODERS, **ENCODERS}
FLOAT = 2e-5
"""Share of the range of the outputs that another order of additions may cost in float32, over a few layers."""
LAYERLESS = ("albert",)
"""One layer's weights for all of them: there is none to take away."""
HEADLESS = ("olmo-2",)
"""One norm over all heads."""


def text(count: int = 4, length: int = 24, seed: int = 1) -> Calibration:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tuple(map(tuple, ids.tolist())), "random ids")


def run(step: Any, source: Checkpoint, **options: Any) -> PassResult:
    step.check(source)
    result: PassResult = step.run(source, Workbench(calibration=text(**options)))
    assert not unaccounted(source, result.checkpoint, result.skipped)
    return result


@torch.no_grad()
def outputs(checkpoint: Checkpoint) -> Tensor:
    """Return what the reference says of some tokens."""
    model, ids = build_reference(checkpoint), ids_of(24)
    said: Tensor
    if checkpoint.task == GENERATION:
        said = model(input_ids=ids, use_cache=False).logits
    else:
        said = model(ids, torch.ones_like(ids))
    return said


def loaded(name: str, folder: Path) -> Checkpoint:
    save(FAMILIES[name], folder)
    return load_checkpoint(folder)


def silenced(source: Checkpoint, layers: Sequence[Parts], gone: Mapping[str, Sequence[int]]) -> Checkpoint:
    """Return the model whose removed parts add nothing: their columns of the output matrix are 0."""
    changed = {}
    for parts in layers:
        name = f"{parts.out}.weight"
        values = source.weights[name].float32().clone()
        values[:, parts.columns[list(gone[parts.path])].flatten()] = 0
        changed[name] = Dense(tuple(values.shape), values.dtype, lambda values=values: values)
    return source.with_weights(changed)


def cut(source: Checkpoint, layers: Sequence[Parts], gone: Mapping[str, Sequence[int]]) -> Checkpoint:
    """Take parts out by hand, nothing refitted: what `narrowing` does, written down again."""
    changed = {}
    for parts in layers:
        stay = [i for i in range(parts.count) if i not in gone[parts.path]]
        columns = parts.columns[stay].flatten().sort().values
        of = {f"{parts.out}.weight": source.weights[f"{parts.out}.weight"].float32()[:, columns]}
        for name, rows in parts.rows.items():
            index = rows[stay].flatten().sort().values
            for each in (f"{name}.weight", f"{name}.bias"):
                if each in source.weights:
                    of[each] = source.weights[each].float32()[index]
        for name, values in of.items():
            changed[name] = Dense(tuple(values.shape), values.dtype, lambda values=values: values)
    return source.with_weights(changed)


@pytest.mark.parametrize("find", [mlps, attentions])
@pytest.mark.parametrize("name", chosen(FAMILIES))
def test_without_its_parts_a_model_is_the_model_with_these_silenced(
    name: str, find: Any, tmp_path: Path
) -> None:
    source = loaded(name, tmp_path)
    if find is attentions and name in HEADLESS:
        with pytest.raises(InputError, match="one norm over all heads"):
            find(source, "test")
        return
    layers = find(source, "test")
    # Layers differ in what they lose: the first loses its first part, each later one more, but never all.
    gone = {
        parts.path: range(min(1 + index * parts.count // 4, parts.count - 1))
        for index, parts in enumerate(layers)
    }
    assert apart(outputs(cut(source, layers, gone)), outputs(silenced(source, layers, gone))) < FLOAT
    assert apart(outputs(cut(source, layers, gone)), outputs(source)) > 100 * FLOAT


@pytest.mark.parametrize("name", chosen(FAMILIES))
def test_layers_go_from_every_family(name: str, tmp_path: Path) -> None:
    source = loaded(name, tmp_path)
    if name in LAYERLESS:
        with pytest.raises(InputError, match="there is none to take away"):
            DropLayers(count=1).check(source)
        return
    result = run(DropLayers(count=1), source)
    made = result.checkpoint
    assert made.parameters < source.parameters
    assert made.config.num_hidden_layers == source.config.num_hidden_layers - 1
    assert apart(outputs(made), outputs(source)) > FLOAT


def test_without_a_layer_a_model_is_the_model_whose_layer_adds_nothing(tmp_path: Path) -> None:
    source = loaded("smollm-3", tmp_path)
    last = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    zero = {
        f"model.layers.0.{name}": torch.zeros(source.weights[f"model.layers.0.{name}"].shape) for name in last
    }
    silent = source.with_weights({k: Dense(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in zero.items()})
    made = with_layers(source, (1, 2), "test")
    assert apart(outputs(made), outputs(silent)) < FLOAT
    assert made.config.no_rope_layers == [
        0,
        1,
    ]  # the second layer of the three goes without: it is the first now
    assert (
        made.weights["model.layers.0.mlp.up_proj.weight"]
        is source.weights["model.layers.1.mlp.up_proj.weight"]
    )


def test_the_layer_goes_that_adds_nothing(tmp_path: Path) -> None:
    source = loaded("llama-3.2", tmp_path)
    for layer in range(3):
        weights = {
            name: source.weights[name]
            for name in source.weights
            if name.startswith(f"model.layers.{layer}.")
            and name.endswith(("o_proj.weight", "down_proj.weight"))
        }
        faint = {
            name: Dense(weight.shape, torch.float32, lambda weight=weight: 1e-4 * weight.float32())
            for name, weight in weights.items()
        }
        result = run(DropLayers(count=1), source.with_weights(faint))
        assert f"removed: {layer} (" in result.notes[0]


def test_a_layer_that_would_become_another_is_refused(tmp_path: Path) -> None:
    source = loaded("gemma-3", tmp_path)
    assert with_layers(source, (1, 2), "test").config.layer_types == ["full_attention", "sliding_attention"]
    # As of a family whose configuration says by a rule, and not by a list, which layers are of which kind.
    config = type(source.config).from_dict(source.config.to_dict())
    config.some_layers = [1]
    with pytest.raises(InputError, match="some_layers of gemma3_text lists 1 where there are 3 layers"):
        DropLayers(count=1).check(replace(source, config=config))


@pytest.mark.parametrize("name", chosen(FAMILIES))
def test_neurons_go_from_every_family(name: str, tmp_path: Path) -> None:
    source = loaded(name, tmp_path)
    made = run(PruneNeurons(fraction=0.25, multiple=16), source).checkpoint
    before, after = mlps(source, "test"), mlps(made, "test")
    assert sum(p.count for p in after) == 0.75 * sum(p.count for p in before)
    assert all(p.count % 16 == 0 for p in after)
    assert 0 < apart(outputs(made), outputs(source)) < 1


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", chosen([name for name in FAMILIES if name not in HEADLESS]))
def test_key_value_groups_go_from_every_family(name: str, uniform: bool, tmp_path: Path) -> None:
    source = loaded(name, tmp_path)
    made = run(PruneKvGroups(fraction=0.5, uniform=uniform), source).checkpoint
    before, after = attentions(source, "test"), attentions(made, "test")
    assert sum(p.count for p in after) == 0.5 * sum(p.count for p in before)
    assert min(p.count for p in after) > 0
    if uniform:
        assert {p.count for p in after} == {before[0].count // 2}
    assert 0 < apart(outputs(made), outputs(source)) < 1


@pytest.mark.parametrize("find", [mlps, attentions])
@pytest.mark.parametrize("name", chosen(FAMILIES))
def test_silent_parts_go_without_a_trace(name: str, find: Any, tmp_path: Path) -> None:
    """Every other part adds nothing; the model without these says the same: what stays belongs together still."""
    source = loaded(name, tmp_path)
    if find is attentions and name in HEADLESS:
        with pytest.raises(InputError, match="one norm over all heads"):
            find(source, "test")
        return
    layers = find(source, "test")
    half = {parts.path: range(0, parts.count, 2) for parts in layers}
    quiet = silenced(source, layers, half)
    neurons, groups = PruneNeurons(fraction=0.5, multiple=1, uniform=True), PruneKvGroups(fraction=0.5)
    made = run(neurons if find is mlps else groups, quiet).checkpoint
    assert [p.count for p in find(made, "test")] == [p.count - (p.count + 1) // 2 for p in layers]
    assert apart(outputs(made), outputs(quiet)) < FLOAT


def test_silent_parts_go_first_and_nothing_is_lost(tmp_path: Path) -> None:
    source = loaded("phi-3", tmp_path)
    layers = mlps(source, "test")
    gone = {parts.path: range(3, 67 if index == 1 else 35) for index, parts in enumerate(layers)}
    quiet = silenced(source, layers, gone)
    made = run(PruneNeurons(fraction=1 / 3, multiple=32), quiet).checkpoint
    assert [parts.count for parts in mlps(made, "test")] == [96, 64, 96]
    # The damping of the least squares holds on to what was there, so that nothing moves where nothing is missing.
    assert apart(outputs(made), outputs(quiet)) < FLOAT


def test_what_is_left_takes_over_what_it_can(tmp_path: Path) -> None:
    """A neuron that is the sum of two others is no loss, whatever it adds."""
    source = loaded("phi-2", tmp_path)
    down = source.weights["model.layers.0.mlp.fc2.weight"].float32()
    x = normal(200, 32, seed=1)
    x[:, 7] = x[:, 2] + 2 * x[:, 11] + 3
    ones = torch.cat((x, torch.ones(200, 1)), 1)
    kept = torch.tensor([i for i in range(32) if i != 7])
    matrix, bias = down[:, :32], normal(down.shape[0])
    made, offset = refit(matrix, bias, ones.t() @ ones / 200, kept)
    assert offset is not None
    expected = x @ matrix.t() + bias
    # The damping, 1e-4 of the mean square, leaves about as much of what the neuron added.
    assert apart(x[:, kept] @ made.t() + offset, expected) < 1e-3
    assert apart(x[:, kept] @ matrix[:, kept].t() + bias, expected) > 0.05


def test_a_part_counts_by_what_it_adds() -> None:
    matrix, x = normal(8, 12), normal(500, 12, seed=1)
    columns = torch.arange(12).view(3, 4)
    moments = torch.cat((x, torch.ones(500, 1)), 1)
    got = contributions(matrix, moments.t() @ moments / 500, columns)
    added = torch.stack([(x[:, part] @ matrix[:, part].t()).square().sum(1).mean() for part in columns])
    torch.testing.assert_close(got, added, rtol=1e-5, atol=0)
    alone = contributions(matrix, moments.t() @ moments / 500, torch.arange(12).unsqueeze(1))
    by_one = torch.stack([(x[:, [i]] @ matrix[:, [i]].t()).square().sum(1).mean() for i in range(12)])
    torch.testing.assert_close(alone, by_one, rtol=1e-5, atol=0)


def test_parts_go_where_a_value_costs_least() -> None:
    cheap, dear = ((0, 0.0), (4, 1.0), (8, 9.0)), ((0, 0.0), (4, 4.0), (8, 8.0))
    assert allocate([cheap, dear], [1, 1], 2, 4) == [4, 0]
    assert allocate([cheap, dear], [1, 1], 2, 8) == [4, 4]
    assert allocate([cheap, dear], [1, 10], 2, 8) == [0, 8]
    assert allocate([cheap, dear], [1, 1], 2, 16) == [8, 8]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("drop-layers", {}, "give count, how many layers go, or fraction"),
        ("drop-layers", {"count": 1, "fraction": 0.5}, "one alone"),
        ("prune-neurons", {"fraction": 1.5}, "between 0 and 1, not 1.5"),
        ("prune-kv-groups", {"fraction": 0}, "between 0 and 1"),
        ("prune-neurons", {"multiple": -1}, "must not be negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_pass(name, options, "here")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (DropLayers(count=3), "3 layers are to go, and .* has 3; one must stay"),
        (PruneNeurons(fraction=0.1, uniform=True), "is none in multiples of 64, the same in every layer"),
        (PruneNeurons(fraction=0.9), "is all in multiples of 64"),
        (PruneKvGroups(fraction=0.2), "is none in multiples of 1"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_any_work(step: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        step.check(loaded("llama-3.2", tmp_path))


def test_quantized_matrices_are_refused(tmp_path: Path) -> None:
    source = GroupQuantize().run(loaded("llama-3.2", tmp_path)).checkpoint
    for step in (PruneNeurons(fraction=0.5, multiple=32), PruneKvGroups(fraction=0.5)):
        with pytest.raises(InputError, match="quantized already; let this pass come before"):
            step.run(source, Workbench(calibration=text()))
