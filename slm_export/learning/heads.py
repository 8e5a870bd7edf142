"""Another head on an encoder: classes of texts, classes of tokens, hidden words, or none at all.

The body keeps its weights; what is new (the head, and the pooler that some classes bring) is drawn from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slm_export.errors import InputError
from slm_export.graph.pooling import Pooling, read_pooling
from slm_export.learning.models import Model
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, FILLING, GENERATION, TOKENS

_CLASSES = {
    CLASSIFICATION: "AutoModelForSequenceClassification",
    TOKENS: "AutoModelForTokenClassification",
    FILLING: "AutoModelForMaskedLM",
    EMBEDDING: "AutoModel",
}
_NEW = ("pooler.",)
"""Parts of a body that a stored encoder may lack."""
_MODULES = "modules.json"
_MODES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
}


def with_head(model: Model, task: str, seed: int, labels: Sequence[str] = ()) -> Model:
    """Return a model for ``task`` with the same body; itself, where it is one for these labels already.

    Raises:
        InputError: the model writes text, or transformers has no such head for it.
    """
    if model.task == GENERATION:
        raise InputError(
            f"{model.folder}: a decoder ({type(model.module).__name__}); heads go on encoders, which is what exports "
            "take for classes and embeddings: give an encoder, or --task generate"
        )
    if task == model.task and (not labels or labels_of(model) == list(labels)):
        return model
    module = _built(model, task, seed, labels)
    missing, unexpected = module.base_model.load_state_dict(
        model.module.base_model.state_dict(), strict=False
    )
    left = [name for name in missing if not name.startswith(_NEW)]
    unexpected = [name for name in unexpected if not name.startswith(_NEW)]
    if left or unexpected:
        raise InputError(
            f"{model.folder}: its body does not fit {type(module).__name__} ({(left + unexpected)[0]}); give another "
            "encoder"
        )
    pooling = (
        (read_pooling(model.folder) if model.pooling is None else model.pooling)
        if task == EMBEDDING
        else None
    )
    return replace(model, module=module.float().eval(), task=task, pooling=pooling)


def labels_of(model: Model) -> list[str]:
    """Return the names of a model's classes by their number."""
    names = model.module.config.id2label or {}
    return [str(names[number]) for number in sorted(names)]


def tidy(model: Model, out: Path) -> None:
    """Make the files beside the weights say what the model is now: pooling of embeddings alone, no foreign labels."""
    if model.task == EMBEDDING:
        if not (out / _MODULES).is_file():
            write_pooling(model.pooling or Pooling(), int(model.module.config.hidden_size), out)
        return
    for name in (_MODULES, "sentence_bert_config.json", "config_sentence_transformers.json"):
        (out / name).unlink(missing_ok=True)
    for folder in out.glob("[0-9]_*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    if model.task in (CLASSIFICATION, TOKENS):
        (out / "labels.txt").unlink(missing_ok=True)


def write_pooling(pooling: Pooling, width: int, out: Path) -> None:
    """Write how vectors are made, in sentence-transformers' layout."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if kind == "Transformer" else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    modes = {key: mode == pooling.mode for mode, key in _MODES.items()}
    (out / _MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (out / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": width, **modes}
    (out / "1_Pooling" / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _built(model: Model, task: str, seed: int, labels: Sequence[str]) -> Any:
    import transformers

    config = type(model.module.config).from_dict(model.module.config.to_dict())
    config.dtype = torch.float32
    config.use_cache = False
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = "single_label_classification" if task == CLASSIFICATION else None
    auto = getattr(transformers, _CLASSES[task])
    options = {"add_pooling_layer": False} if task == EMBEDDING and _pools(model) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return auto.from_config(
                config, attn_implementation=model.module.config._attn_implementation, **options
            )
        except ValueError as error:
            raise InputError(
                f"{model.folder}: transformers has no head for {task} on a model of type '{config.model_type}'"
            ) from error


def _pools(model: Model) -> bool:
    import inspect

    return "add_pooling_layer" in inspect.signature(type(model.module.base_model).__init__).parameters
