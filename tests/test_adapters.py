"""A peft folder as MODEL: merged into its base, as peft itself runs the two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.source.adapter_files import CONFIG
from slm_export.source.adapters import MERGED, merged_from
from slm_export.source.hub import find_model, find_shapes
from slm_export.source.load import load_checkpoint

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])


def adapted(base: Path, folder: Path, **options: Any) -> Path:
    """Save an adapter with random matrices; return its folder."""
    import peft

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(init_lora_weights=False, **asked)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def run_unmerged(base: Path, folder: Path) -> torch.Tensor:
    import peft

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model.eval()(IDS).logits


def run_ours(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return build_reference(load_checkpoint(folder))(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"use_dora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 16}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["all linear", "rank-stabilised", "dora", "ranks by layer", "whole modules"],
)
def test_a_merged_model_is_what_peft_runs(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_llama
    if "modules_to_save" in options:  # each of the two is trained by itself
        base = untied(tiny_llama, tmp_path / "untied")
    folder = adapted(base, tmp_path / "mine", **options)
    made = find_model(str(folder))
    wanted = run_unmerged(base, folder)
    assert not torch.allclose(run_ours(base), wanted, atol=1e-2)
    torch.testing.assert_close(run_ours(made), wanted, atol=2e-5, rtol=2e-5)
    facts = merged_from(made)
    assert facts is not None
    assert (facts.adapter, facts.base, facts.kind, facts.rank) == ("mine", base.name, "LORA", 4)


def untied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_is_merged_once_and_again_when_anything_has_changed(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    folder = adapted(base, tmp_path / "mine")
    first = find_model(str(folder))
    written = (first / MERGED).stat().st_mtime_ns
    assert find_model(str(folder)) == first
    assert (first / MERGED).stat().st_mtime_ns == written
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    second = find_model(str(folder))
    assert second != first
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert find_model(str(folder)) not in (first, second)
    assert not list(first.parent.parent.glob("*/.*.partial"))


def test_files_beside_the_adapter_count_more_than_the_base_s(tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapted(tiny_llama, tmp_path / "mine")
    template = {"chat_template": "{{ messages[0].content }}!"}
    written = json.loads((tiny_llama / "tokenizer_config.json").read_text()) | template
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    (folder / "LICENSE").write_text("as you like")
    made = find_model(str(folder))
    assert json.loads((made / "tokenizer_config.json").read_text())["chat_template"].endswith("!")
    assert (made / "LICENSE").read_text() == "as you like"
    assert (made / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert find_shapes(str(folder)) == tiny_llama


def test_a_base_may_lie_beside_its_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapted(tiny_llama, tmp_path / "mine")
    shutil.copytree(tiny_llama, folder / "base")
    rename(folder, base_model_name_or_path="base")
    torch.testing.assert_close(
        run_ours(find_model(str(folder))), run_unmerged(tiny_llama, folder), atol=2e-5, rtol=2e-5
    )


def rename(folder: Path, **changed: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changed))


def another_model(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    more = {name.replace("layers.0", "layers.7"): value.clone() for name, value in weights.items()}
    save_file(weights | more, folder / "adapter_model.safetensors")


def half_of_it(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")


def other_widths(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    wider = {name: torch.cat([value, value], 1) for name, value in weights.items()}
    save_file(wider, folder / "adapter_model.safetensors")


def no_numbers(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value * torch.nan for name, value in weights.items()}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (another_model, r"does not belong to .*layers\.7.* has no place in it"),
        (half_of_it, "is not in adapter_model.safetensors"),
        (other_widths, "does not belong to"),
        (no_numbers, "cannot be merged: .*NaN"),
        (lambda folder: rename(folder, base_model_name_or_path=None), "base_model_name_or_path is missing"),
        (
            lambda folder: rename(folder, base_model_name_or_path="not/here"),
            "base_model_name_or_path: not/here",
        ),
        (lambda folder: rename(folder, base_model_name_or_path=str(folder)), "is an adapter too"),
        (lambda folder: rename(folder, task_type="SEQ_CLS"), "is one for SEQ_CLS, but its base is a Llama"),
        (lambda folder: rename(folder, peft_type="NONSENSE"), "knows no .NONSENSE"),
        (
            lambda folder: rename(folder, megatron_config={}, megatron_core="antigravity"),
            "megatron_config: Input should be None",
        ),
        (lambda folder: rename(folder, r=10**9), "a rank of 1000000000, and no tensor"),
        (
            lambda folder: rename(folder, rank_pattern={"q_proj": 10**9}),
            "a rank of 1000000000, and no tensor",
        ),
        (lambda folder: rename(folder, r="8"), "r: Input should be a valid integer"),
        (lambda folder: rename(folder, lora_alpha=[1]), "lora_alpha: Input should be a valid number"),
        (lambda folder: rename(folder, layer_replication=[[0, 10**9]]), "1000000000 layers, of at most"),
        (lambda folder: rename(folder, twist=3), "knows no 'twist' of LORA, and would leave it out"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "truncated or corrupt"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{}"), "holds a model .* and an adapter"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = adapted(tiny_llama, tmp_path / "mine")
    spoil(folder)
    with pytest.raises(InputError, match=words):
        find_model(str(folder))


def test_learned_tokens_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "mine")
    with pytest.raises(InputError, match="PROMPT_TUNING puts learned tokens before the text"):
        find_model(str(tmp_path / "mine"))


def test_an_adapter_is_exported_like_any_model(tiny_llama: Path, tmp_path: Path, cli: Cli) -> None:
    folder = adapted(tiny_llama, tmp_path / "mine")
    done = cli(folder, "--target", "host", "--format", "onnx", "--no-bench", "--bits", "8", "--out", "out")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "mine"
    assert manifest["model"]["adapter"]["base"] == tiny_llama.name
    assert manifest["model"]["adapter"]["rank"] == 4


def test_added_tokens_come_with_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    import peft

    base = untied(tiny_llama, tmp_path / "untied")
    wider = AutoModelForCausalLM.from_pretrained(base)
    wider.resize_token_embeddings(4128)
    wider.save_pretrained(tmp_path / "wider")
    folder = adapted(
        tmp_path / "wider",
        tmp_path / "mine",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    rename(folder, base_model_name_or_path=str(base))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "wider"), folder)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
    made = find_model(str(folder))
    assert wanted.shape[-1] == 4128
    torch.testing.assert_close(run_ours(made), wanted, atol=2e-5, rtol=2e-5)
