"""The good files that inputs are made from: a small model, its adapter, and its bundle in four formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def make_good(folder: Path) -> None:
    """Write the good files of every reader: a Llama of one layer, its bundle in four formats, texts and settings."""
    _write_model(folder / "model")
    for name in ("weights", "toml", "text"):
        (folder / name).mkdir()
    _write_weights(folder / "weights" / "model.safetensors")
    _write_shards(folder / "model", folder / "shards")
    (folder / "encoder" / "1_Pooling").mkdir(parents=True)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in _MODULES]
    (folder / "encoder" / "modules.json").write_text(json.dumps(modules))
    (folder / "encoder" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "toml" / "slm-export.toml").write_text(_SETTINGS)
    (folder / "toml" / "device.toml").write_text(_PROFILE)
    (folder / "toml" / "delegates.toml").write_text(_DELEGATES)
    (folder / "toml" / "federation.toml").write_text(_FEDERATION)
    for name, file in (("bundle", "manifest.json"), ("base", "config.json")):
        (folder / "toml" / name).mkdir()
        (folder / "toml" / name / file).write_text("{}")
    _write_adapter(folder / "model", folder / "adapter")
    (folder / "text" / "text.txt").write_text("A page of text.\nIts second line.\n\f\nAnother document.\n")
    (folder / "text" / "chats.jsonl").write_text(_CHATS)
    _write_bundle(folder)


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["A page of text. " * 20, "Its second line, and another one. " * 20], trainer)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_adapter(base: Path, folder: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.fill_(0.01)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    # Where a reader finds it beside the folder that it is given.
    settings["base_model_name_or_path"] = "../good/model"
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def _write_weights(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    save_file(
        {f"layers.{at}": torch.ones(4, 8, dtype=dtype) for at, dtype in enumerate(dtypes)},
        path,
        {"format": "pt"},
    )


def _write_shards(model: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    files = {name: SHARDS[at % 2] for at, name in enumerate(sorted(tensors))}
    for file in SHARDS:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_bundle(folder: Path) -> None:
    from slm_export import driver
    from slm_export.compilation import Request, make_plan
    from slm_export.exporters import onnx_file
    from slm_export.native_log import kept_from_terminal
    from slm_export.progress import Progress, StderrConsole
    from slm_export.quantization_options import QuantizationOptions

    formats = ("executorch", "litert", "onnx")
    for target, chosen, out in (("android", formats, "bundle"), ("ios", ("coreml",), "apple")):
        request = Request(
            model=str(folder / "model"), target=target, formats=chosen, out=folder / out,
            quantization=QuantizationOptions(bits=4, group_size=32), context=64, verify=False, bench=False,
        )  # fmt: skip
        with kept_from_terminal() as stderr:
            driver.export(make_plan(request), Progress(StderrConsole(stderr)))
    shutil.copytree(folder / "apple" / "coreml", folder / "coreml")
    shutil.rmtree(folder / "apple")
    (folder / "onnx-data").mkdir()
    largest, onnx_file.LARGEST = onnx_file.LARGEST, 0
    least, onnx_file._LEAST_OUTSIDE = onnx_file._LEAST_OUTSIDE, 256
    try:
        _write_onnx_with_data(folder)
    finally:
        onnx_file.LARGEST, onnx_file._LEAST_OUTSIDE = largest, least


def _write_onnx_with_data(folder: Path) -> None:
    from slm_export.optimizers.group_quantize import GroupQuantize
    from slm_export.registry import exporter
    from slm_export.runtime import ExportOptions
    from slm_export.source.load import load_checkpoint

    checkpoint = GroupQuantize(bits=4, group=32).run(load_checkpoint(folder / "model")).checkpoint
    options = ExportOptions(64, (1,), 0, 2, tokenizer=folder / "model")
    exporter("onnx").write(checkpoint, options, folder / "onnx-data" / "model.onnx")


_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
_SETTINGS = """\
model = "."
target = "android"
formats = ["executorch", "onnx"]
bits = 4
group_size = 32
embedding_bits = 8
context = 64
eval_text = "text.txt"
out = "out"
max_size = "600MB"
min_tokens_per_s = 3.5
[gates]
max_kl_mean = 0.5
min_top1_agreement = 0.5
max_bytes = 1000000
[diff]
max_bytes_increase = 0.02
"""
_DELEGATES = """\
state = "delegates.sqlite"
[webhook]
port = 8081
token_env = "TOKEN"
[delegates.one]
bundle = "bundle"
prompt = "Say {text} of {path} at {time}"
trigger = { cron = "0 7 * * mon-fri", read = "machine.log", missed = "once" }
where = "local-then-remote"
rule = { longer_than = 400, confidence_below = 0.6, busy_above = 2.0, hotter_than = 80 }
remote = { url = "https://llm.example.org/v1", model = "large", timeout = "60s", retries = 2 }
sampling = { temperature = 0.5, top_p = 0.9, max_tokens = 8, seed = 1 }
output = { command = ["cat", "-"], timeout = "30s", attempts = 3 }
[delegates.two]
bundle = "bundle"
private = true
trigger = { webhook = true }
output = { file = "out.jsonl" }
"""
_FEDERATION = """\
out = "adapter"
[model]
base = "base"
rank = 2
targets = ["q_proj"]
bits = 4
[data]
texts = ["texts"]
anonymise = { how = "replace", only = ["PERSON"] }
[rounds]
number = 3
clients = 20
fraction = 0.5
deadline_s = 600
[local]
steps = 4
rate = 0.001
[privacy]
unit = "user"
epsilon = 8.0
delta = 0.001
clip = 0.5
[aggregation]
largest = 10
[server]
listen = "127.0.0.1:9092"
certificate = "tls/server.pem"
key = "tls/server.key"
clients = "keys"
[client]
server = "127.0.0.1:9092"
ca = "tls/ca.pem"
key = "id"
"""
_PROFILE = """\
schema = 1
name = "mine"
title = "My phone"
target = "android"
formats = ["executorch", "litert"]
soc = "A chip"
context = 64
[cpu]
cores = { clusters = [{ core = "A", count = 4, ghz = 2.5 }], source = "a page" }
[memory]
total_gb = { value = 8, source = "a page" }
bandwidth_gb_s = { value = 51.2, source = "another page" }
[coreml]
ios = 18
query_lengths = [1, 64]
[gates]
max_kl_mean = 0.5
[[recipe]]
pass = "sparsify"
[[recipe]]
pass = "group-quantize"
bits = 4
group = 32
"""
_CHATS = "\n".join(
    json.dumps(line)
    for line in (
        {
            "messages": [
                {"role": "user", "content": "What is a page? " * 12},
                {"role": "assistant", "content": "Text."},
            ]
        },
        {"text": "A page of text. Its second line, and another one. " * 12},
        {
            "messages": [
                {"role": "user", "content": "And a line? " * 12},
                {"role": "assistant", "content": "Less."},
            ]
        },
    )
)
