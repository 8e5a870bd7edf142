"""A transformers Llama, converted by coremltools with its cache as state, beside eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mil_llama import CONTEXT, Decoder, llama, save

from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Package

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(layers=2, width=64)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Evaluator:
    path = tmp_path_factory.mktemp("llama") / "llama.mlpackage"
    save(Decoder(model), path, None)
    return Evaluator(Package.open(path))


def test_logits_are_eager_s(model: Any, evaluator: Evaluator) -> None:
    model.config._attn_implementation = "eager"
    ids = torch.randint(0, 512, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
    state = evaluator.make_state()
    assert sorted(state) == ["keys_0", "keys_1", "values_0", "values_1"]
    start, step = 0, 12
    while start < CONTEXT:
        given = {"ids": ids[:, start : start + step].int(), "start": torch.tensor([start], dtype=torch.int32)}
        made = evaluator.predict(given, state)["logits"]
        # fp16 throughout: logits of about 1, after two layers.
        torch.testing.assert_close(made.float(), wanted[:, start : start + step], rtol=0, atol=4e-3)
        start, step = start + step, 1
    assert all(cache.isfinite().all() and cache.abs().sum(-1).all() for cache in state.values())


def test_the_cache_is_updated_where_it_is(evaluator: Evaluator) -> None:
    updates = [step for step in evaluator._plan.steps if ": slice_update" in step.where]
    assert len(updates) == 4
    assert all("in_place" in step.run.keywords for step in updates)  # type: ignore[attr-defined]
    assert not any("copied" in getattr(step.run, "keywords", {}) for step in evaluator._plan.steps)
