"""Is what was emitted as good as its source? Judged on the emitted file, in its own runtime.

    tokens      a decoder on held-out text: KL divergence, top-1 agreement, perplexity
    prompts     a decoder that reads prompts at once, turn by turn: the worst place
    greedy      a decoder's own long text: does it stop, loop or wander where the source would not
    encoders    embeddings and class scores over varied sentences
    vocabularies how a text is read by an artifact that has fewer tokens than its source
    tokenizers  the app's tokenizer and stop tokens against the source's
    references  the torch models that artifacts are compared with
    steps       codes against the numbers that they stand for, block by block
    exactness   a miniature of the model, in 32 bits, against the same miniature in torch
    thresholds  what is demanded where neither profile nor settings say

Two distances are kept apart: quantization loss (source against the same model with the quantized weights, both
in torch) and lowering loss (that torch model, with the artifact's activation quantization, against the
artifact). The first is the price of the bits; the second is a bug until explained.
"""

from slm_export.fidelity.encoders import judge_encoder
from slm_export.fidelity.references import References, references
from slm_export.fidelity.thresholds import default_gates
from slm_export.fidelity.tokenizers import (
    TokenizerVerdict,
    judge_opening_token,
    judge_stop_tokens,
    judge_tokenizer,
    judge_tokenizer_file,
    judge_vocabulary,
)
from slm_export.fidelity.tokens import judge_decoder

__all__ = [
    "References",
    "TokenizerVerdict",
    "default_gates",
    "judge_decoder",
    "judge_encoder",
    "judge_opening_token",
    "judge_stop_tokens",
    "judge_tokenizer",
    "judge_tokenizer_file",
    "judge_vocabulary",
    "references",
]
