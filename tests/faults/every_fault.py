"""Every fault that is planted while an artifact is made."""

from __future__ import annotations

import attention_faults
import cache_faults
import file_faults
import layer_faults
import rope_faults
import tokenizer_faults
import weight_faults
from fault import Fault

FAULTS: tuple[Fault, ...] = (
    *rope_faults.FAULTS,
    *attention_faults.FAULTS,
    *layer_faults.FAULTS,
    *weight_faults.FAULTS,
    *cache_faults.FAULTS,
    *tokenizer_faults.FAULTS,
    *file_faults.FAULTS,
)
