"""Low-rank training: a few thin matrices learn, and are merged into the model in the end (LoRA, Hu et al. 2021).

peft carries them; what is saved is a plain model again, which every exporter takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slm_export.errors import InputError, MissingComponentError


@contextmanager
def low_rank(
    module: Any, rank: int, seed: int, whole: tuple[str, ...] = ()
) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Yield what is to be trained, and a function that merges what was learned back into ``module``.

    Given   rank: of the change of every linear layer but the output; 0: the module itself is trained, as a whole
            whole: names of parts that are trained as a whole beside them, such as a new head

    Raises:
        InputError: there is no linear layer to adapt.
        MissingComponentError: peft is not installed.
    """
    if rank == 0:
        yield module, lambda: None
        return
    try:
        import peft
    except ImportError as error:
        raise MissingComponentError(
            f"--low-rank needs peft, which cannot be imported ({error}); pip install 'slm-export[learning]'"
        ) from error
    config = peft.LoraConfig(
        r=rank,
        # A factor of 2, whatever the rank is.
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=list(whole) or None,
        exclude_modules=list(whole) or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            adapted: Any = peft.get_peft_model(module, config)
        except ValueError as error:
            raise InputError(f"--low-rank: this model cannot be adapted: {error}") from error

    def merge() -> None:
        merged = adapted.merge_and_unload()
        assert merged is module, "adapters are merged where they were put on"

    yield adapted, merge
