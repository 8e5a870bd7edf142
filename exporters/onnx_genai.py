"""onnxruntime-genai: the configuration that its runner reads, its tokenizer, its generation loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.graph.dialect import AttentionShape
from slm_export.jsonfile import read_object
from slm_export.runtime import ExportOptions
from slm_export.tokenization.runtime_tokenizers import TokenizerLoadError

CONFIG = "genai_config.json"
_ADAPTER = "adapter"
_SAMPLER = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What generation_config.json may say, in words that are the same there."""


def write_config(
    checkpoint: Checkpoint, options: ExportOptions, layers: Sequence[AttentionShape], path: Path
) -> None:
    """Write genai_config.json beside the model at ``path``."""
    config = checkpoint.config.get_text_config()
    names = {part: f"past_key_values.%d.{part}" for part in ("key", "value")}
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if options.places:
        # Else a warning for each, that an input with a default is no constant.
        session["log_severity_level"] = 3
    decoder = {
        "session_options": session,
        "filename": path.name,
        "head_size": layers[0].head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": names["key"],
            "past_value_names": names["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": layers[0].heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": layers[0].kv_heads,
    }
    stops = list(options.stop_ids)
    model: dict[str, Any] = {
        # Not by its family: some names there stand for graphs of other inputs.
        "type": "decoder",
        "context_length": options.context,
        "vocab_size": config.vocab_size,
        "pad_token_id": options.pad_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "decoder": decoder,
    }
    if options.bos_id is not None:
        model["bos_token_id"] = options.bos_id
    made = {"model": model, "search": _search(checkpoint.folder, options.context)}
    path.with_name(CONFIG).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Told:
    """What genai_config.json beside a model says of its tokens; nothing without that file."""

    stop_ids: tuple[int, ...]
    bos_id: int | None
    vocabulary: int | None


def told(path: Path) -> Told:
    """Return what is said of the tokens of a model."""
    model = _model_of(path)
    stops = model.get("eos_token_id", ())
    return Told(
        (stops,) if isinstance(stops, int) else tuple(stops),
        model.get("bos_token_id"),
        model.get("vocab_size"),
    )


def _model_of(path: Path) -> dict[str, Any]:
    file = path.with_name(CONFIG)
    model = read_object(file).get("model") if file.is_file() else {}
    if not isinstance(model, dict):
        raise InputError(f"{file}: has no table 'model'; export the model again")
    for key in ("bos_token_id", "eos_token_id", "vocab_size"):
        named = model.get(key, 0)
        if not all(type(token) is int for token in (named if isinstance(named, list) else [named])):
            raise InputError(f"{file}: {key} is {json.dumps(named)}, no whole number; export the model again")
    for key in ("bos_token_id", "vocab_size"):
        if isinstance(model.get(key), list):
            raise InputError(f"{file}: {key} is a list; export the model again")
    return model


class GenaiTokenizer:
    """The tokenizer of onnxruntime-genai, from the folder of a model."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path) -> None:
        """Open the tokenizer, or raise ``TokenizerLoadError`` with the runtime's own words."""
        import onnxruntime_genai

        try:
            self._made: Any = onnxruntime_genai.Tokenizer(str(folder))
            self._made.update_options(add_special_tokens="false")
        except Exception as error:  # the binding raises plain Exception and RuntimeError alike
            raise TokenizerLoadError(
                f"{folder}: onnxruntime-genai cannot load the tokenizer: {error}"
            ) from error

    @property
    def bos_id(self) -> int | None:
        """The opening token that genai_config.json names."""
        return int(self._made.bos_token_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens that genai_config.json names."""
        return tuple(int(token) for token in self._made.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added before or after it."""
        try:
            return [int(token) for token in self._made.encode(text)]
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return what an app shows: the pieces of the runtime's stream, joined."""
        stream = self._made.create_stream()
        try:
            return "".join(stream.decode(int(token)) for token in ids)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def generate(folder: Path, prompt: str, tokens: int, bos: int, adapter: Path | None = None) -> str:
    """Return ``tokens`` greedy tokens as text.

    Given   bos: how many opening tokens come before the prompt
            adapter: an ``.onnx_adapter`` that is on meanwhile
    """
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="false")
    ids = [int(tokenizer.bos_token_id)] * bos + [int(token) for token in tokenizer.encode(prompt)]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + tokens)
    generator = genai.Generator(model, parameters)
    if adapter is not None:
        adapters = genai.Adapters(model)
        adapters.load(str(adapter), _ADAPTER)
        generator.set_active_adapter(adapters, _ADAPTER)
    generator.append_tokens(ids)
    stream, parts = tokenizer.create_stream(), []
    while not generator.is_done():
        generator.generate_next_token()
        parts.append(stream.decode(generator.get_next_tokens()[0]))
    return "".join(parts)


def _search(folder: Path, context: int) -> dict[str, Any]:
    """Return the defaults of sampling, and one buffer for past and present."""
    file = folder / "generation_config.json"
    named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    search: dict[str, Any] = {"do_sample": False, "max_length": context, "past_present_share_buffer": True}
    return {**search, **{key: named[key] for key in _SAMPLER if named.get(key) is not None}}
