"""Does the evaluator tell the truth? The same packages in Core ML itself, where it is: `pytest -m mac`, on a Mac.

Written on Linux against coremltools' documented interface, and not run yet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import INT8, apart, ids_of
from test_coreml import CONTEXT, Exported, export, source

from slm_export.exporters.coreml_graph import DECODE, IDS, LOGITS, MASK, PREFILL

pytestmark = [
    pytest.mark.mac,
    pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on Apple's systems alone"),
]
TOKENS = 24
HALF = 5e-3
"""Share of the range that two orders of float16 operations may part by."""


def model(made: Exported, function: str | None = None) -> Any:
    import coremltools

    units = coremltools.ComputeUnit.CPU_ONLY
    return coremltools.models.MLModel(str(made.path), compute_units=units, function_name=function)


def mask(tokens: int, end: int) -> np.ndarray[Any, Any]:
    rows = np.arange(end - tokens, end)[:, None]
    return np.where(np.arange(end) <= rows, 0, -np.inf).astype(np.float16)[None, None]


@pytest.mark.parametrize("name", list(families.DECODERS))
def test_a_decoder_in_core_ml_is_the_evaluators(name: str, tmp_path: Path) -> None:
    """A prompt through one function, single tokens through the other, over one state."""
    made = export(INT8.run(source(name, tmp_path / "source")).checkpoint, tmp_path / "Model.mlpackage")
    prefill, decode = model(made, PREFILL), model(made, DECODE)
    state, session = prefill.make_state(), made.session()
    ids = ids_of(TOKENS)[0].tolist()
    steps = [(prefill, ids[:16], 0), *((decode, [ids[at]], at) for at in range(16, TOKENS))]
    for function, tokens, start in steps:
        inputs = {IDS: np.array([tokens], dtype=np.int32), MASK: mask(len(tokens), start + len(tokens))}
        got = torch.from_numpy(function.predict(inputs, state)[LOGITS])[0, -1].float()
        assert apart(got, session.logits(tokens, start)) < HALF


@pytest.mark.parametrize("name", list(families.ENCODERS))
def test_an_encoder_in_core_ml_is_the_evaluators(name: str, tmp_path: Path) -> None:
    made = export(INT8.run(source(name, tmp_path / "source")).checkpoint, tmp_path / "Model.mlpackage")
    tokens = ids_of(CONTEXT)[0].tolist()
    session = made.session()
    given = {"input_ids": tokens, "attention_mask": [1] * CONTEXT, "token_type_ids": [0] * CONTEXT}
    names = [feature.name for feature in made.package.functions["main"].inputs]
    inputs = {name: np.array([given[name]], dtype=np.int32) for name in names}
    (got,) = model(made).predict(inputs).values()
    assert apart(torch.from_numpy(got)[0].float(), session.outputs(tokens, [1] * CONTEXT)) < HALF
