"""The sparsify pass: zeros where they cost least, in the pattern asked for, and only where they gain anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_models
import torch
from checkpoints import normal
from families import DECODERS, ENCODERS
from small_models import divergence, random_text
from test_structure import loaded, run
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Request, make_plan
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.sparsify import METHODS, Sparsify
from slm_export.profile import FORMATS
from slm_export.weights import Dense, Quantized

PATTERNS = ((0.5, 0), (0.75, 0), (0.5, 4), (0.75, 4), (0.875, 16))
COLUMNS = 160
"""More than one chunk."""


def inputs(columns: int = COLUMNS) -> Tensor:
    """Return the moments of inputs that mostly follow from half as many numbers."""
    x = normal(4 * columns, columns // 2, seed=1) @ normal(columns // 2, columns, seed=2)
    x += 0.5 * normal(4 * columns, columns, seed=3)
    return x.t() @ x / len(x)


def loss(change: Tensor, moments: Tensor) -> Tensor:
    """Return the mean square by which each output moves, float64 (out,)."""
    change, moments = change.double(), moments.double()
    return ((change @ moments) * change).sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("fraction", "block"), PATTERNS)
def test_every_block_has_its_zeros(method: str, fraction: float, block: int) -> None:
    matrix = normal(8, COLUMNS)
    made = Sparsify(fraction, block, method).sparse(matrix, inputs())  # type: ignore[arg-type]
    zeros = (made == 0).view(8, -1, block or COLUMNS).sum(-1)
    if block or method != "sparsegpt":
        assert (zeros == fraction * zeros.new_tensor(block or COLUMNS)).all()
    else:  # chosen chunk by chunk
        assert (zeros == fraction * COLUMNS).all()
    if method != "sparsegpt":
        assert torch.equal(made[made != 0], matrix[made != 0])


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_goes_is_at_most_its_share_of_the_squares(method: str, block: int) -> None:
    """The k least of n squares add up to k/n of all of them at most."""
    matrix, fraction = normal(8, COLUMNS), 0.75
    weigh = inputs().diagonal() if method == "wanda" else torch.ones(COLUMNS)
    gone = matrix - Sparsify(fraction, block, method).sparse(matrix, inputs())  # type: ignore[arg-type]
    lost, whole = (gone.square() * weigh).sum(1), (matrix.square() * weigh).sum(1)
    assert (lost <= fraction * whole * (1 + 1e-6)).all()
    assert (lost < 0.75 * fraction * whole).all(), "a normal row has far less in its lower three quarters"


def test_where_inputs_do_not_depend_on_each_other_nothing_can_be_made_up_for() -> None:
    matrix = normal(8, 128)
    made = Sparsify(method="sparsegpt").sparse(matrix, torch.eye(128))
    assert torch.equal(made, Sparsify(method="magnitude").sparse(matrix, torch.eye(128)))


@pytest.mark.parametrize("block", [0, 4])
def test_what_is_left_makes_up_for_what_went(block: int) -> None:
    """Between the least squares for its zeros, which nothing can beat, and the same rule without making up."""
    matrix, moments = normal(8, COLUMNS), inputs()
    made = Sparsify(0.5, block).sparse(matrix, moments)
    lost = loss(made - matrix, moments)
    best = torch.stack([least(row, mask, moments) for row, mask in zip(matrix, made != 0, strict=True)])
    assert (lost >= best * (1 - 1e-6)).all()
    wanda = Sparsify(0.5, block, "wanda").sparse(matrix, moments)
    assert lost.sum() < loss(wanda - matrix, moments).sum()
    assert lost.sum() < 0.7 * loss(torch.where(made != 0, matrix, 0) - matrix, moments).sum()


def least(row: Tensor, kept: Tensor, moments: Tensor) -> Tensor:
    c, w = moments.double(), row.double()
    more = torch.linalg.solve(c[kept][:, kept], c[kept][:, ~kept] @ w[~kept])
    change = torch.zeros_like(w)
    change[~kept], change[kept] = -w[~kept], more
    return loss(change[None], moments)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text() -> Calibration:
    return random_text()


def test_making_up_is_worth_it(llama: Checkpoint, text: Calibration) -> None:
    lost = {
        method: divergence(
            llama, Sparsify(0.5, 4, method).run(llama, Workbench(calibration=text)).checkpoint, text
        )  # type: ignore[arg-type]
        for method in METHODS
    }
    assert lost["sparsegpt"] < 0.95 * lost["wanda"] < lost["magnitude"]


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros_on_the_grid(bits: int, llama: Checkpoint, text: Calibration) -> None:
    result = Sparsify(0.75, 4).run(llama, Workbench(calibration=text))
    made = GroupQuantize(bits=bits).run(result.checkpoint).checkpoint  # type: ignore[arg-type]
    sparse = [name for name in llama.weights if name not in result.skipped]
    assert len(sparse) == 14
    for name in sparse:
        weight, floats = made.weights[name], result.checkpoint.weights[name]
        assert isinstance(weight, Quantized)
        assert isinstance(floats, Dense)
        assert (weight.codes()[floats.load() == 0] == 0).all()
        assert ((weight.codes() == 0).view(len(weight.codes()), -1, 4).sum(-1) >= 3).all()


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_family(name: str, tmp_path: Path) -> None:
    source = loaded(name, tmp_path)
    result = run(Sparsify(0.5, 2), source, count=1, length=16)
    for key, role in source.roles.items():
        assert (key in result.skipped) == (role != "linear"), key
        if role == "linear":
            zeros = result.checkpoint.weights[key].float32() == 0
            assert (zeros.view(len(zeros), -1, 2).sum(-1) >= 1).all(), key


def test_a_quantized_matrix_is_refused(llama: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"is quantized already; let this pass come before the quantization"):
        run(Sparsify(), GroupQuantize().run(llama).checkpoint)


def test_a_block_has_to_divide_the_columns(tmp_path: Path) -> None:
    source = small_models.llama(tmp_path, hidden_size=64, intermediate_size=100)
    with pytest.raises(
        InputError, match=r"down_proj.weight has 100 columns, which blocks of 16 do not divide"
    ):
        Sparsify(0.5, 16).check(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.4}, r"fraction must be at least 0.5 and below 1, not 0.4"),
        ({"fraction": 1.0}, r"fraction must be at least 0.5 and below 1, not 1.0"),
        ({"block": 3}, r"block must be one of 0, 2, 4, 8, 16, not 3"),
        ({"fraction": 0.6, "block": 4}, r"a fraction of 0.6 of 4 columns is no whole number"),
        ({"method": "chance"}, r"method must be one of magnitude, wanda, sparsegpt, not 'chance'"),
        ({"tokens": 0}, r"tokens must be positive"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=rf"^sparsify: {message}"):
        Sparsify(**options)  # type: ignore[arg-type]


def profile(folder: Path, *, formats: str, behind: str = "group-quantize", more: str = "") -> str:
    path = folder / "mine.toml"
    target = "ios" if formats == "coreml" else "linux"
    path.write_text(
        f'schema = 1\nname = "mine"\ntitle = "Mine"\ntarget = "{target}"\nformats = ["{formats}"]\n'
        f'[[recipe]]\npass = "sparsify"\n[[recipe]]\npass = "{behind}"\n{more}'
    )
    return str(path)


@pytest.mark.parametrize(
    ("format", "kernel"),
    [
        ("executorch", "XNNPACK has no sparse int8 or int4 kernel"),
        ("litert", "XNNPACK, which computes for it, has no sparse int8 or int4 kernel"),
        ("onnx", "ONNX Runtime has no sparse kernel for a quantized matrix"),
    ],
)
def test_formats_that_gain_nothing_are_refused_before_any_work(
    format: str, kernel: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"^sparsify: format {format} gains nothing from zeros: {kernel}"):
        make_plan(Request(model="theirs", device=profile(tmp_path, formats=format)))


def test_core_ml_is_what_gains(tmp_path: Path) -> None:
    plan = make_plan(Request(model="theirs", device=profile(tmp_path, formats="coreml")))
    assert [step.name for step in plan.recipe] == ["sparsify", "group-quantize"]
    assert {"executorch", "litert", "onnx", "coreml"} == set(FORMATS), (
        "another format has to say what it gains"
    )
    with pytest.raises(
        InputError, match=r"^sparsify: coreml for iOS 17 cannot store quantized matrices with a mask"
    ):
        make_plan(
            Request(model="theirs", device=profile(tmp_path, formats="coreml", more="[coreml]\nios = 17\n"))
        )


@pytest.mark.parametrize("behind", ["gptq", "recover", "prune-neurons", "palettize"])
def test_a_pass_that_would_fill_the_zeros_is_refused(behind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^sparsify: {behind} behind it would not keep its zeros"):
        make_plan(Request(model="theirs", device=profile(tmp_path, formats="coreml", behind=behind)))
