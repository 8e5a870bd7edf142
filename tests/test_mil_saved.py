"""Programs saved by coremltools and read back: functions, compressed weights, flexible inputs, a mistake of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Package

I32 = torch.int32


@pytest.fixture(scope="module")
def ct() -> Any:
    return pytest.importorskip("coremltools")


def saved(ct: Any, program: Any, path: Path, **options: Any) -> Package:
    target = options.pop("target", ct.target.iOS18)
    model = ct.convert(program, minimum_deployment_target=target, skip_model_load=True, **options)
    model.save(str(path))
    return Package.open(path)


def test_two_functions_share_weights_and_state(ct: Any, tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float16)
    descriptor = ct.utils.MultiFunctionDescriptor()

    def make(tokens: int) -> Any:
        @mb.program(
            input_specs=[
                mb.TensorSpec((tokens, 64), dtype=types.fp16),
                mb.TensorSpec((1,), dtype=types.int32),
                mb.StateTensorSpec((8, 8), dtype=types.fp16),
            ],
            opset_version=ct.target.iOS18,
        )
        def program(x: Any, start: Any, cache: Any) -> Any:
            new = mb.linear(x=x, weight=weight)
            begin = mb.concat(values=[start, np.array([0], np.int32)], axis=0)
            end = mb.concat(values=[mb.add(x=start, y=np.int32(tokens)), np.array([8], np.int32)], axis=0)
            updated = mb.slice_update(x=mb.read_state(input=cache), update=new, begin=begin, end=end)
            stored = mb.coreml_update_state(state=cache, value=updated)
            return mb.reduce_sum(x=stored, axes=[0], name="sum")

        return program

    for name, tokens in (("prefill", 4), ("decode", 1)):
        file = tmp_path / f"{name}.mlpackage"
        ct.convert(make(tokens), minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(
            str(file)
        )
        descriptor.add_function(str(file), "main", name)
    descriptor.default_function_name = "decode"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))

    both = Package.open(tmp_path / "both.mlpackage")
    assert (sorted(both.functions), both.default) == (["decode", "prefill"], "decode")
    prefill, decode = Evaluator(both, "prefill"), Evaluator(both)
    state, x = prefill.make_state(), torch.randn(6, 64).half()
    prefill.predict({"x": x[:4], "start": torch.tensor([0], dtype=I32)}, state)
    for at in (4, 5):
        made = decode.predict({"x": x[at : at + 1], "start": torch.tensor([at], dtype=I32)}, state)["sum"]
    expected = (x.float() @ torch.from_numpy(weight).float().T).half()
    torch.testing.assert_close(state["cache"][:6], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(made.float(), state["cache"].float().sum(0), rtol=2e-3, atol=2e-3)
    pool = both.prepared["pool"]
    assert (
        sum(c.ready() is not None for made, _ in pool._made.values() for c in made if c.shape == (8, 64)) == 1
    )
    with pytest.raises(InputError, match="has no function 'decoder'; did you mean 'decode'"):
        Evaluator(both, "decoder")


def test_compressed_weights_of_ios_16(ct: Any, tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 128)).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec((2, 128))], opset_version=ct.target.iOS16)
    def program(x: Any) -> Any:
        return mb.linear(x=x, weight=weight, name="y")

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    optimize = ct.optimize.coreml
    passes = {
        "constexpr_affine_dequantize": (
            optimize.linear_quantize_weights,
            optimize.OpLinearQuantizerConfig(),
            0.03,
        ),
        "constexpr_lut_to_dense": (
            optimize.palettize_weights,
            optimize.OpPalettizerConfig(mode="kmeans", nbits=6),
            0.2,
        ),
        "constexpr_sparse_to_dense": (
            optimize.prune_weights,
            optimize.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=1),
            0.8,
        ),
    }
    x = torch.randn(2, 128)
    for kind, (compress, config, error) in passes.items():
        path = tmp_path / f"{kind}.mlpackage"
        compress(model, optimize.OptimizationConfig(global_config=config)).save(str(path))
        read = Package.open(path)
        assert any(each.kind == kind for each in read.functions["main"].operations)
        made, wanted = Evaluator(read).predict({"x": x})["y"], x @ torch.from_numpy(weight).T
        assert 0 < (made - wanted).square().mean().sqrt() / wanted.std() < error


def test_vector_tables_and_4_bit_codes(ct: Any, tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin

    rng = np.random.default_rng(0)
    indices = rng.integers(0, 8, size=(32, 64))
    tables = rng.normal(size=(4, 1, 8, 2)).astype(np.float16)

    @mb.program(input_specs=[mb.TensorSpec((1, 64), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        weight = mb.constexpr_lut_to_dense(
            indices=indices.astype(nptype_from_builtin(types.uint3)), lut=tables, vector_axis=0
        )
        return mb.linear(x=x, weight=weight, name="y")

    x = torch.randn(1, 64).half()
    made = Evaluator(saved(ct, program, tmp_path / "lut.mlpackage")).predict({"x": x})["y"]
    weight = np.stack([tables[row // 8, 0, indices[row]] for row in range(32)])  # (32, 64, 2)
    wanted = x.double() @ torch.from_numpy(weight.transpose(0, 2, 1).reshape(64, 64)).double().T
    torch.testing.assert_close(made.double(), wanted, rtol=2e-3, atol=2e-2)


def test_flexible_inputs(ct: Any, tmp_path: Path) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    traced = torch.jit.trace(Double(), torch.zeros(1, 4))
    shapes = {
        "ranged": ct.Shape((1, ct.RangeDim(2, 6, default=4))),
        "listed": ct.EnumeratedShapes([[1, 4], [1, 8]]),
    }
    for name, shape in shapes.items():
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(name="x", shape=shape)],
            outputs=[ct.TensorType(name="y")],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(tmp_path / f"{name}.mlpackage"))
        evaluator = Evaluator(Package.open(tmp_path / f"{name}.mlpackage"))
        (feature,) = evaluator.function.inputs
        assert feature.shape == (1, 4)
        for length in (1, 2, 4, 6, 8):
            x = torch.randn(1, length).half()
            if length in ((2, 4, 6) if name == "ranged" else (4, 8)):
                torch.testing.assert_close(evaluator.predict({"x": x})["y"], x * 2, rtol=1e-3, atol=1e-3)
            else:
                words = r"\[1, 2..6\]" if name == "ranged" else r"\[1, 4\] or \[1, 8\]"
                with pytest.raises(InputError, match=rf"input 'x' has the shape \[1, {length}\].*{words}"):
                    evaluator.predict({"x": x})


def test_coremltools_types_the_choice_of_two_scalars_wrongly(ct: Any, tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        mask = mb.select(cond=mb.greater(x=x, y=0.0), a=np.float32(0), b=np.float32(-np.inf))
        return mb.add(x=x, y=mask, name="y")

    read = saved(ct, program, tmp_path / "select.mlpackage", compute_precision=ct.precision.FLOAT32)
    with pytest.raises(InputError, match=r"select .* is declared fp32 \[\], but is torch.float32 \[1, 4\]"):
        Evaluator(read).predict({"x": torch.randn(1, 4)})
