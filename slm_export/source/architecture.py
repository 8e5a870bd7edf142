"""What kind of model a folder holds: its transformers class, its task, an empty module of it.

Nothing here knows a family by name: transformers' own classes are the source of every architecture, the
task follows from the class, and code that a folder brings along is never executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slm_export.errors import InputError, suggestion
from slm_export.jsonfile import read_object
from slm_export.source.empty import empty_on_meta
from slm_export.source.tasks import EMBEDDING, ENDINGS, task_of

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Architecture:
    """A configuration, and the transformers class that it asks for."""

    config: Any
    cls: Any
    task: str

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.cls.__name__)

    def empty_module(self, attention: str = "eager", tensors: int | None = None) -> nn.Module:
        """Return the module, its matrices on the meta device and its computed buffers real.

        ``attention`` is the name of a function registered with transformers' AttentionInterface, ``tensors`` how many
        the files hold, where they bound what is built; InputError where the configuration asks for more.
        """
        from transformers.initialization import no_init_weights

        config = type(self.config).from_dict(self.config.to_dict())
        config._attn_implementation = attention
        config.use_cache = False
        with no_init_weights(), empty_on_meta(tensors):
            module: nn.Module = self.cls(config, **self.options)
        return module.eval().requires_grad_(False)

    @property
    def options(self) -> dict[str, Any]:
        """What the class is built with, beside its configuration."""
        # The pooler of BERT and its kin serves next-sentence prediction: no embedding is read from it.
        return {"add_pooling_layer": False} if self._has_needless_pooler() else {}

    def _has_needless_pooler(self) -> bool:
        import inspect

        parameters = inspect.signature(self.cls.__init__).parameters
        return self.task == EMBEDDING and "add_pooling_layer" in parameters


def read_architecture(folder: Path) -> Architecture:
    """Read ``config.json`` and find its class in transformers.

    Raises:
        InputError: no config, a broken one, one that needs code of its own, an unknown architecture.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    raw = _read_config(folder / "config.json")
    config = _parse(folder / "config.json", raw)
    cls = _class_of(folder / "config.json", raw)
    return Architecture(config, cls, _task_of(folder / "config.json", cls.__name__))


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent}: no config.json; give a Hugging Face model folder")
    return read_object(path)


def _parse(path: Path, raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _refuse_endless(path, raw)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{path}: no model_type; a Hugging Face config.json names one")
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise InputError(
                f"{path}: model type '{kind}' needs Python code that comes with the model (auto_map), which "
                "is never executed here; convert the model to an architecture that transformers has"
            )
        raise InputError(f"{path}: unknown model type '{kind}'{_nearest(kind, CONFIG_MAPPING)}")
    try:
        return AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: transformers rejects it: {reason}") from error


def _refuse_endless(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse numbers of layers that no model has: transformers makes lists of that length."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _refuse_endless(path, value)
        elif re.search(r"layers?$", key) and type(value) is int and value > _MOST_LAYERS:
            raise InputError(f"{path}: {key} is {value:,}; no model has more than {_MOST_LAYERS:,}")


def _class_of(path: Path, raw: Mapping[str, Any]) -> Any:
    import transformers

    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            f"{path}: 'architectures' is missing; name the model's class, [\"LlamaForCausalLM\"]"
        )
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        if raw.get("auto_map"):
            raise InputError(
                f"{path}: architecture {names[0]} needs Python code that comes with the model (auto_map), "
                "which is never executed here"
            )
        known = [name for name in dir(transformers) if task_of(name)]
        raise InputError(f"{path}: unknown architecture '{names[0]}'{_nearest(names[0], known)}")
    return cls


def _task_of(path: Path, name: str) -> str:
    if (task := task_of(name)) is not None:
        return task
    endings = ", ".join(f"...{ending}" for ending in ENDINGS)
    raise InputError(f"{path}: {name} is not a kind of model that can be exported; those are {endings}")


def _nearest(word: str, known: Any) -> str:
    # Hundreds of names are known: one that is near helps, all of them do not.
    hint = suggestion(word, known)
    return hint if "did you mean" in hint else ""
