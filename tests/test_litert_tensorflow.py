"""Encoders' ``.tflite`` in TensorFlow's own interpreter: an app may have that one instead of LiteRT's.

TensorFlow runs in a process of its own: it takes seconds to import, and brings its own copies of libraries that
LiteRT has loaded here.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import INT8, WHOLE, apart, ids_of
from torch import Tensor

from slm_export.exporters.litert import LiteRTExporter
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import EncoderSession, ExportOptions
from slm_export.source.load import load_checkpoint

CONTEXT, TOKENS = 40, 20
"""A function of 32 tokens and one of 40: the input fills neither."""
SAME = 1e-5
"""Share of the range of the output: both run XNNPACK's kernels, each its own version of them."""
INT4 = GroupQuantize(bits=4, group=32, embedding_bits=4)
MODELS = {
    "bert, 32 bits": ("bert", WHOLE),
    "bert, 8 bits": ("bert", INT8),
    "bert, 4 bits": ("bert", INT4),
    "distilbert, 8 bits": ("distilbert, answers", INT8),
}

_IN_TENSORFLOW = """
import pathlib, sys, numpy, tensorflow
for path in map(pathlib.Path, sys.argv[2:]):
    with numpy.load(sys.argv[1]) as given:
        inputs = dict(given)
    interpreter = tensorflow.lite.Interpreter(model_path=str(path))
    outputs = {}
    for name in interpreter.get_signature_list():
        run = interpreter.get_signature_runner(name)
        room = ((0, 0), (0, int(name.removeprefix("encode_")) - inputs["input_ids"].shape[1]))
        padded = {key: numpy.pad(inputs[key], room) for key in run.get_input_details()}
        (outputs[name],) = run(**padded).values()
    numpy.savez(path.with_suffix(".npz"), **outputs)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="tensorflow not installed: slm-export[tensorflow]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as a file, and beside it what TensorFlow makes of the input."""
    folder = tmp_path_factory.mktemp("tensorflow")
    for name, (family, recipe) in MODELS.items():
        families.save(families.ENCODERS[family], folder / family)
        checkpoint = recipe.run(load_checkpoint(folder / family)).checkpoint
        LiteRTExporter().write(checkpoint, ExportOptions(CONTEXT), folder / f"{name}.tflite")
    ids = ids_of(TOKENS).to(torch.int32).numpy()
    np.savez(
        folder / "given.npz",
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        token_type_ids=np.zeros_like(ids),
    )
    files = [folder / f"{name}.tflite" for name in MODELS]
    command = [sys.executable, "-c", _IN_TENSORFLOW, *map(str, (folder / "given.npz", *files))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_function_gives_in_tensorflow_what_it_gives_in_litert(folder: Path, name: str) -> None:
    path = folder / f"{name}.tflite"
    task = load_checkpoint(folder / MODELS[name][0]).task
    session = LiteRTExporter().open(path, task)
    assert isinstance(session, EncoderSession)
    found = outputs_of(path)
    assert found.keys() == {"encode_32", f"encode_{CONTEXT}"}
    for function, got in found.items():
        padding = [0] * (int(function.removeprefix("encode_")) - TOKENS)
        expected = session.outputs([*ids_of(TOKENS)[0].tolist(), *padding], [*[1] * TOKENS, *padding])
        assert apart(got, expected) <= SAME
        # What tells that the input was read: other ids give another output.
        assert (
            apart(got, session.outputs([*range(3, 3 + TOKENS), *padding], [*[1] * TOKENS, *padding])) > 0.01
        )


def outputs_of(path: Path) -> Mapping[str, Tensor]:
    with np.load(path.with_suffix(".npz")) as found:
        return {function: torch.from_numpy(output)[0] for function, output in found.items()}
