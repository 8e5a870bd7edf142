"""The thresholds that an artifact must meet; None leaves a figure reported but not judged.

Every bound compares a figure of the manifest (``quality``, ``artifacts``, ``latency``) by name:
``max_kl_mean`` bounds ``kl_mean`` from above, ``min_top1_agreement`` bounds ``top1_agreement`` from below.
``min_accelerated`` bounds a share that follows from ``delegation`` of the report.
Built-in defaults depend on the bits of the recipe; a profile's ``[gates]`` overrides them, the
user's ``slm-export.toml`` overrides both.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

TELLING = ("litert", "coreml")
"""Formats of which can be told what an accelerator takes: measured for LiteRT, predicted for Core ML."""

SPEED = (
    "min_decode_tokens_per_s",
    "min_prefill_tokens_per_s",
    "max_time_to_first_token_ms",
    "max_latency_ms",
    "max_model_rss_mb",
)
"""Thresholds of what is measured while an artifact runs: on the clock, and of memory."""


class Gates(BaseModel):
    """Thresholds. KL in nats per token, agreement as shares of 1, sizes in bytes, rates in tokens/s."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # decoders: the artifact against the source model, on held-out text
    max_kl_mean: float | None = Field(default=None, gt=0)
    max_kl_p99: float | None = Field(default=None, gt=0)
    max_kl_max: float | None = Field(default=None, gt=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    # decoders: the artifact's own long greedy text, judged by the source model
    min_greedy_agreement: float | None = Field(default=None, ge=0, le=1)
    # decoders: the runtime's tokenizer against the source's, on strings that are chosen to be hard
    min_tokenizer_agreement: float | None = Field(default=None, ge=0, le=1)
    # the artifact against torch with the same weight codes and activation quantization
    max_lowering_kl_mean: float | None = Field(default=None, gt=0)
    max_lowering_max_abs: float | None = Field(default=None, gt=0)
    # decoders: the same two behind prompts that are read at once, turn after turn; the worst place
    max_prompt_kl_max: float | None = Field(default=None, gt=0)
    # passes: codes against the numbers they stand for, in steps of the grid
    max_rounding_steps: float | None = Field(default=None, gt=0)
    max_rounding_bias: float | None = Field(default=None, gt=0)
    # encoders: embeddings
    min_cosine_mean: float | None = Field(default=None, ge=-1, le=1)
    min_cosine_min: float | None = Field(default=None, ge=-1, le=1)
    # encoders: class scores
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    max_max_abs: float | None = Field(default=None, gt=0)
    # the file, and its speed on the machine that measured it
    max_bytes: int | None = Field(default=None, gt=0)
    min_decode_tokens_per_s: float | None = Field(default=None, gt=0)
    min_prefill_tokens_per_s: float | None = Field(default=None, gt=0)
    max_time_to_first_token_ms: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_model_rss_mb: float | None = Field(default=None, gt=0)
    # the share of multiply-adds that fast kernels take, or that a preferred unit is predicted to take
    min_accelerated: float | None = Field(default=None, ge=0, le=1)

    def over(self, base: Gates) -> Gates:
        """Return ``base`` with every threshold that is set here replaced."""
        return base.model_copy(update=self.model_dump(exclude_none=True))
