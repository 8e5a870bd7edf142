"""What is demanded of an artifact where neither the device profile nor slm-export.toml says.

They depend on the fewest bits in the recipe, because that is what the user chose to pay. They are set to catch
what is broken (a wrong grid, a lost bias, a misplaced position), with room for what the bits
cost a small model; a product should state its own.
"""

from __future__ import annotations

from slm_export.gates import Gates
from slm_export.source.tasks import EMBEDDING, GENERATION

# Lowering: activations are rounded to int8 on both sides. Where a value lies on the edge of a step the two may
# round apart, and the difference spreads; so this is a small fraction of what the rounding itself costs, not 0.
# Prompts: behind the worst of some forty turns, good artifacts were off by up to 0.002 nats, those that lose or
# misplace a token by 0.6 and more.
_DECODER = {
    4: Gates(
        max_kl_mean=0.15,
        min_top1_agreement=0.80,
        max_perplexity_ratio=1.15,
        min_greedy_agreement=0.75,
        max_lowering_kl_mean=0.01,
        max_prompt_kl_max=0.1,
        min_tokenizer_agreement=0.9,
    ),
    8: Gates(
        max_kl_mean=0.02,
        min_top1_agreement=0.93,
        max_perplexity_ratio=1.02,
        min_greedy_agreement=0.90,
        max_lowering_kl_mean=0.01,
        max_prompt_kl_max=0.1,
        min_tokenizer_agreement=0.9,
    ),
    16: Gates(
        max_kl_mean=0.001,
        min_top1_agreement=0.98,
        max_perplexity_ratio=1.005,
        min_greedy_agreement=0.97,
        max_lowering_kl_mean=0.001,
        max_prompt_kl_max=0.01,
        min_tokenizer_agreement=0.9,
    ),
}
_EMBEDDING = {
    4: Gates(min_cosine_mean=0.95, min_cosine_min=0.85),
    8: Gates(min_cosine_mean=0.995, min_cosine_min=0.97),
    16: Gates(min_cosine_mean=0.9995, min_cosine_min=0.999),
}
_SCORES = {
    4: Gates(min_agreement=0.90),
    8: Gates(min_agreement=0.97),
    16: Gates(min_agreement=0.99),
}
_ANY = Gates(max_rounding_steps=2.5, max_rounding_bias=0.25)
"""Whatever the task and the bits; `rounding` says what good passes leave."""
_BY_TASK = {
    GENERATION: _DECODER,
    EMBEDDING: _EMBEDDING,
}


def default_gates(task: str, bits: int) -> Gates:
    """Return the thresholds for a task and the fewest bits of any weight in the recipe; 32 counts as 16."""
    return _BY_TASK.get(task, _SCORES)[min(bits, 16)].over(_ANY)
