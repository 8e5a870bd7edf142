"""The two files of an adapter that peft saved, read as a stranger's.

peft believes what a configuration says: it imports the module that `megatron_core` names, allocates as much as `r` asks
for, and answers a wrong type with whatever comes first. So what is written is held against this schema, and against
the tensors, before peft sees it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm_export.bundles.checksums import sha256_file
from slm_export.errors import InputError, MissingComponentError
from slm_export.jsonfile import read_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LAYERS = 4096
"""That a replication of layers may come to."""
_KINDS = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
"""peft's word for a task -> how the transformers class that was adapted ends."""
_REJECTIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)
"""As which peft says that something does not fit, or trips over it."""

_Rank = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Written(BaseModel):
    """The keys that mean the same in all kinds of adapters, or decide what is imported, allocated or repeated."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: _Rank | None = None
    rank_pattern: dict[str, _Rank] | None = None
    lora_alpha: _Number | None = None
    alpha: _Number | None = None
    alpha_pattern: dict[str, _Number] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = None
    bias: str | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = None
    megatron_config: None = None
    """Would have peft import the module that `megatron_core` names."""
    runtime_config: None = None

    @property
    def ranks(self) -> Iterator[int]:
        """Every rank that is named."""
        if self.r is not None:
            yield self.r
        yield from (self.rank_pattern or {}).values()


def adapter_sha256(folder: Path) -> str:
    """Return the hash of an adapter: of its configuration and its weights.

    Raises:
        InputError: it has no weights.
    """
    _require_weights(folder)
    return hashlib.sha256(
        f"{sha256_file(folder / CONFIG)} {sha256_file(folder / WEIGHTS)}".encode()
    ).hexdigest()


def peft_config(folder: Path) -> Any:
    """Return what peft makes of an adapter's configuration.

    Raises:
        InputError: it is not one that peft knows, asks for more than its tensors hold, or puts tokens before the text.
        MissingComponentError: peft is not installed.
    """
    peft = _peft(folder)
    document = read_object(folder / CONFIG)
    written = _checked(folder, document)
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if written.peft_type not in kinds:
        raise InputError(
            f"{folder / CONFIG}: peft_type: peft {peft.__version__} knows no '{written.peft_type}'"
        )
    known = {field.name for field in dataclasses.fields(kinds[written.peft_type])}
    for key, value in document.items():
        if key not in known and value not in (None, False, [], {}):
            raise InputError(
                f"{folder / CONFIG}: peft {peft.__version__} knows no '{key}' of {written.peft_type}, and would leave "
                "it out; update peft, or set it to null if the adapter does not need it"
            )
    _refuse_larger_than_tensors(folder, written)
    with rejected(f"{folder / CONFIG}: peft rejects it"):
        config = peft.PeftConfig.from_peft_type(**{k: v for k, v in document.items() if k in known})
    if config.is_prompt_learning:
        raise InputError(
            f"{folder}: {config.peft_type.value} puts learned tokens before the text, "
            "which cannot be merged into weights"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Any]:
    """Return an adapter's tensors by peft's names for them; InputError where they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _require_weights(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError, *_REJECTIONS) as error:
        raise InputError(
            f"{path}: truncated or corrupt ({first_line(error)}); save the adapter again"
        ) from None


@contextmanager
def rejected(what: str) -> Iterator[None]:
    """Turn what peft says, or trips over, into an InputError that begins with ``what``."""
    try:
        yield
    except _REJECTIONS as error:
        raise InputError(f"{what}: {first_line(error)}") from error


def refuse_another_task(folder: Path, config: Any, cls: str) -> None:
    """Raise InputError where an adapter is for another task than a class of models."""
    kind = getattr(config.task_type, "value", config.task_type)
    ending = _KINDS.get(str(kind))
    if ending and not cls.endswith(ending) and not (ending == "CausalLM" and cls.endswith("LMHeadModel")):
        raise InputError(
            f"{folder / CONFIG}: the adapter is one for {kind}, but its base is a {cls}; merge it where it was trained "
            "(merge_and_unload, save_pretrained), and give the merged folder"
        )


def refuse_lost(folder: Path, base: Path, lost: Set[str], missing: Set[str]) -> None:
    """Raise InputError where tensors of an adapter have no place in its base, or some are not there."""
    if lost or missing:
        what = f"{min(lost)} has no place in it" if lost else f"{min(missing)} is not in {WEIGHTS}"
        raise InputError(
            f"{folder}: does not belong to {base}: {what} ({len(lost) + len(missing)} tensors in all); "
            f"name the model that it was trained on in {CONFIG}"
        )


def first_line(error: Exception) -> str:
    """Return the first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _require_weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():  # a pipe would block for ever
        raise InputError(f"{folder}: no {WEIGHTS}; save the adapter with peft's save_pretrained")
    return path


def _peft(folder: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingComponentError(
            f"{folder}: an adapter needs peft, which cannot be imported ({error}); pip install 'slm-export[learning]'"
        ) from error
    return peft


def _checked(folder: Path, document: dict[str, Any]) -> _Written:
    try:
        written = _Written.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, found["loc"]))
        raise InputError(f"{folder / CONFIG}: {place}: {found['msg']}") from None
    copies = sum(max(0, end - start) for start, end in written.layer_replication or ())
    if copies > _LAYERS or any(start < 0 for start, _ in written.layer_replication or ()):
        raise InputError(
            f"{folder / CONFIG}: layer_replication: {copies} layers, of at most {_LAYERS}, none before 0"
        )
    return written


def _refuse_larger_than_tensors(folder: Path, written: _Written) -> None:
    """Refuse ranks that no tensor has: peft allocates what is asked for before it looks at them."""
    sizes = [size for tensor in read_tensors(folder).values() for size in tensor.shape]
    largest = max(written.ranks, default=0)
    if sizes and largest > max(sizes):
        raise InputError(
            f"{folder / CONFIG}: a rank of {largest}, and no tensor of {WEIGHTS} has more than {max(sizes)} rows or "
            "columns; configuration and weights are of two adapters"
        )
