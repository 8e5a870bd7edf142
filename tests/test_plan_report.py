"""After an export, predicted stands beside measured: of this machine, and of the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import small_models
from sample_reports import decoder_report

from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.planning import compiled
from slm_export.planning.model import read_model
from slm_export.planning.roofline import Machine, work_of
from slm_export.planning.storage import store
from slm_export.profile import load_profile
from slm_export.reports.details import PredictedPhase, Prediction
from slm_export.reports.page.sections import predicted_rows
from slm_export.results import Artifact, TokenLatency

LATENCY = TokenLatency("host CPU", 2, 5, 32, prefill_tokens_per_s=640.0, decode_tokens_per_s=50.0)
FAST = Machine("this machine", 1e10, 5e9, "a test")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "this_machine", lambda: FAST)


@pytest.mark.parametrize("tied", [True, False])
def test_a_made_artifact_is_seen_as_it_was_planned(tied: bool, tmp_path: Path) -> None:
    loaded = small_models.llama(tmp_path, tie_word_embeddings=tied)
    made = GroupQuantize().run(loaded).checkpoint
    planned = read_model(tmp_path)
    shape, stored = compiled.shape_of(made)
    expected = work_of(planned, store(planned, [("group-quantize", {})])[0], 1, 10, 4)
    assert work_of(shape, stored, 1, 10, 4) == expected
    assert expected.bytes["int4"] > 0
    assert expected.kv_bytes > 0


@pytest.mark.usefixtures("machine")
def test_predicted_stands_beside_measured(tmp_path: Path) -> None:
    made = GroupQuantize().run(small_models.llama(tmp_path)).checkpoint
    prediction = compiled.here(made, "executorch", LATENCY)
    assert prediction is not None
    prefill, decode = prediction.phases
    assert (prefill.name, decode.name) == ("prefill of 32 tokens", "decode")
    assert (prefill.measured_s, decode.measured_s) == (32 / 640, 1 / 50)
    assert 0 < decode.predicted_s < prefill.predicted_s
    assert prediction.bytes_per_s <= 1.25 * 1e10


@pytest.mark.usefixtures("machine")
def test_what_was_not_measured_is_not_compared(tmp_path: Path) -> None:
    made = GroupQuantize().run(small_models.llama(tmp_path)).checkpoint
    assert compiled.here(made, "executorch", None) is None
    assert compiled.here(made, "coreml", LATENCY) is None  # nothing was fitted for it here


def test_a_device_is_predicted_where_its_profile_tells_enough(tmp_path: Path) -> None:
    made = GroupQuantize().run(small_models.llama(tmp_path)).checkpoint
    told = compiled.there(made, "executorch", load_profile("oneplus-12"))
    assert told is not None
    assert told.where == "OnePlus 12"
    assert all(phase.measured_s is None for phase in told.phases)
    assert compiled.there(made, "executorch", load_profile("pixel-8")) is None  # no bandwidth is published
    assert (
        compiled.there(made, "executorch", load_profile("host")) is None
    )  # measured, and not predicted alone


def test_the_page_tells_which_machine_a_prediction_is_of(tmp_path: Path) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(b"0")
    report = decoder_report(Artifact(file, "executorch", 1, "0" * 64, 4.5))
    phase = PredictedPhase("decode", 2e6, 1e6, 0.002, 0.003)
    here = Prediction("this machine", 1e10, 1e12, (phase,))
    phone = Prediction("A phone", 5e10, 4e12, (dataclasses.replace(phase, measured_s=None),))
    (one,) = report.formats
    both = dataclasses.replace(report, formats=(dataclasses.replace(one, prediction=here, on_device=phone),))
    assert predicted_rows(both) == [
        ("executorch on this machine, decode", "2 ms", "3 ms", "1.50"),
        ("executorch on A phone, decode", "2 ms", "not measured", ""),
    ]
    alone = dataclasses.replace(report, formats=(dataclasses.replace(one, prediction=here, on_device=None),))
    assert predicted_rows(alone)[0][0] == "executorch, decode"
