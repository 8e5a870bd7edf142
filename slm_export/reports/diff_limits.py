"""How far a new bundle may be from an old one: the ``[diff]`` table of slm-export.toml, and ``--limit`` of the command.

A limit is named after the figure that it bounds: ``max_kl_mean_increase`` bounds how far ``kl_mean`` may grow. For
sizes, speed and memory it is a share of the old value (0.02 is 2 %), for fidelity a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm_export.errors import InputError, suggestion

_Limit = Field(default=None, ge=0)


class DiffLimits(BaseModel):
    """Limits; None bounds nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes_increase: float | None = _Limit
    max_bits_per_weight_increase: float | None = _Limit
    # fidelity: differences
    max_kl_mean_increase: float | None = _Limit
    max_top1_agreement_decrease: float | None = _Limit
    max_perplexity_ratio_increase: float | None = _Limit
    max_greedy_agreement_decrease: float | None = _Limit
    max_cosine_mean_decrease: float | None = _Limit
    max_cosine_min_decrease: float | None = _Limit
    max_agreement_decrease: float | None = _Limit
    max_max_abs_increase: float | None = _Limit
    # speed and memory on the machine that measured both
    max_decode_tokens_per_s_decrease: float | None = _Limit
    max_prefill_tokens_per_s_decrease: float | None = _Limit
    max_time_to_first_token_ms_increase: float | None = _Limit
    max_latency_ms_increase: float | None = _Limit
    max_load_ms_increase: float | None = _Limit
    max_model_rss_mb_increase: float | None = _Limit
    # what is no figure of an artifact
    max_codes_changed: float | None = Field(default=None, ge=0, le=1)
    """Share of the codes that differ, of those that either bundle has."""
    max_toolchain_changes: int | None = Field(default=None, ge=0)
    """Packages whose version differs."""

    def over(self, base: DiffLimits) -> DiffLimits:
        """Return ``base`` with every limit that is set here replaced."""
        return base.model_copy(update=self.model_dump(exclude_none=True))


def parse_limits(texts: Sequence[str]) -> DiffLimits:
    """Return the limits of ``NAME=VALUE`` texts.

    Raises:
        InputError: an unknown name, or a value that is no number of its range.
    """
    values: dict[str, float] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in DiffLimits.model_fields:
            raise InputError(
                f"--limit {text}: unknown limit '{name}'{suggestion(name, DiffLimits.model_fields)}"
            )
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"--limit {text}: '{value}' is no number; write {name}=0.02") from None
    try:
        return DiffLimits.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InputError(f"--limit {first['loc'][0]}={first['input']}: {first['msg'].lower()}") from None
