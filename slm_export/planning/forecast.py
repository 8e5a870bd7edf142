"""A forecast: what an export of a model by a recipe takes, and how it runs on a device.

A figure that the profile or the measurements do not tell is None, and ``unknown`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm_export.planning.conversion import Conversion, conversion_of
from slm_export.planning.machines import host_memory, machine_of
from slm_export.planning.memory import KV_PRECISIONS, KV_VALUE, Memory, kv_bytes, longest_context, memory_of
from slm_export.planning.model import ModelShape
from slm_export.planning.roofline import Constants, Machine, fitted, seconds, work_of
from slm_export.planning.shaping import shaped
from slm_export.planning.sizes import Sizes, sizes_of
from slm_export.planning.storage import Recipe, Stored, smaller, store
from slm_export.profile import DeviceProfile

PROMPT = 128
"""Tokens that time to first token and prefill are told for, as exports measure them."""
DEFAULT_CONTEXT = 2048
CONTEXTS = (512, 1024, 2048, 4096, 8192)
_NO_CONSTANTS = Constants({}, {}, 0.0)
_NO_LIMIT = {
    "android": "no limit of memory for one app is published: Android ends what uses most when memory runs out",
    "ios": "the limit for one app of this device is not published",
}


@dataclass(frozen=True)
class Speed:
    """Of one stream."""

    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    time_to_first_token_ms: float | None
    load_ms: float | None
    """Opening the file, its pages in memory already."""


@dataclass(frozen=True)
class Forecast:
    """One model, recipe, format and device."""

    device: str
    format: str
    context: int
    sizes: Sizes
    memory: Memory
    kv_cache: dict[int, dict[str, int]]
    """Context -> precision -> bytes."""
    speed: Speed
    limit: int | None
    """Bytes that one app may use; where that is not published, of the whole device."""
    limit_of: str
    """app, or device."""
    fits: bool | None
    """None where only the device's memory is known, and the model is smaller than that."""
    longest_context: int | None
    conversion: Conversion | None
    nearest: str | None
    """Options of the nearest recipe that would fit, where this one does not; None where none does."""
    unknown: dict[str, str]
    """Figure -> why it is not predicted."""
    notes: tuple[str, ...]


def forecast(
    model: ModelShape, profile: DeviceProfile, format: str, recipe: Recipe, context: int | None
) -> Forecast:
    """Predict an export and its run on a device.

    Raises:
        InputError: the recipe does not fit the model.
    """
    model, untold = shaped(model, recipe)
    stored, notes = store(model, recipe)
    room = _context(model, profile, context)
    sizes = sizes_of(model, stored, format, room)
    memory = memory_of(model, sizes.total, room, format)
    limit, whole = _limit(profile)
    fits = _fits(memory, limit, whole)
    machine = machine_of(profile)
    constants = fitted()["host" if profile.target == "host" else "device"].get(format, _NO_CONSTANTS)
    speed = _speed(model, stored, sizes, format, machine, constants)
    unknown = _unknown(model, machine, speed, profile, format, constants)
    if fits is None:
        unknown["fits"] = _NO_LIMIT.get(profile.target, f"profile {profile.name} states no memory")
    return Forecast(
        profile.name,
        format,
        room,
        sizes,
        memory,
        _kv_table(model, room),
        speed,
        limit,
        "app" if profile.memory and profile.memory.app_limit_gb else "device",
        fits,
        None if limit is None else longest_context(model, sizes.total, format, limit),
        conversion_of(model, format),
        _nearest(model, recipe, format, room, limit) if fits is False and limit is not None else None,
        unknown,
        (*untold, *notes),
    )


def _speed(
    model: ModelShape,
    stored: Sequence[Stored],
    sizes: Sizes,
    format: str,
    machine: Machine,
    constants: Constants,
) -> Speed:
    value = KV_VALUE[format]
    read = seconds(work_of(model, stored, PROMPT, 0, value), machine, constants)
    token = seconds(work_of(model, stored, 1, PROMPT, value), machine, constants) if model.decodes else None
    opens = constants.load_share and machine.bytes_per_s and constants.load_share * machine.bytes_per_s
    return Speed(
        1 / token if token else None,
        PROMPT / read if read else None,
        1000 * read if read else None,
        opens and 1000 * sizes.total / opens,
    )


def _context(model: ModelShape, profile: DeviceProfile, asked: int | None) -> int:
    wanted = asked or (profile.context if model.decodes else model.positions) or DEFAULT_CONTEXT
    return min(wanted, model.positions) if model.positions and not asked else wanted


def _limit(profile: DeviceProfile) -> tuple[int | None, bool]:
    """Return the bytes that are there at most, and whether one app may have them all."""
    if profile.memory is None:
        return (host_memory(), True) if profile.target == "host" else (None, False)
    if profile.memory.app_limit_bytes is not None:
        return profile.memory.app_limit_bytes, True
    return profile.memory.total_bytes, profile.target in ("linux", "host")


def _fits(memory: Memory, limit: int | None, whole: bool) -> bool | None:
    """Return whether a model fits; where only the memory of the whole device is known, that can be ruled out alone."""
    if limit is not None and memory.total > limit:
        return False
    return True if limit is not None and whole else None


def _unknown(
    model: ModelShape,
    machine: Machine,
    speed: Speed,
    profile: DeviceProfile,
    format: str,
    constants: Constants,
) -> dict[str, str]:
    why = {}
    if speed.load_ms is None:
        why["load"] = "packing weights was not measured on such a device, and no figure of it was found"
    if machine.bytes_per_s is None:
        reason = f"profile {profile.name} states no memory bandwidth"
    elif not constants.share:
        reason = f"no measurement of {format} on such a device was found to fit it on"
    else:
        reason = f"no measurement of {format} in these precisions on such a device was found to fit it on"
    if speed.decode_tokens_per_s is None:
        why["decode"] = reason if model.decodes else "an encoder writes no tokens"
    if speed.prefill_tokens_per_s is None:
        known = machine.bytes_per_s is not None and constants.per_cycle and machine.cycles_per_s is None
        why["prefill"] = _no_rate(profile) if known else reason
    if conversion_of(model, format) is None:
        why["conversion"] = f"the time of converting to {format} was not measured"
    return why


def _no_rate(profile: DeviceProfile) -> str:
    if profile.target == "host":
        return "multiply-adds were measured on processors with AVX-512 VNNI alone"
    if profile.cpu and profile.cpu.isa and "i8mm" not in profile.cpu.isa.features:
        return f"the cores of {profile.name} have no i8mm, and no published figure of such cores was found"
    return f"profile {profile.name} states no clocks"


def _kv_table(model: ModelShape, context: int) -> dict[int, dict[str, int]]:
    lengths = sorted({*CONTEXTS, context})
    if not model.kv_values:
        return {}
    return {
        length: {name: kv_bytes(model, length, size) for name, size in KV_PRECISIONS.items()}
        for length in lengths
        if model.positions is None or length <= model.positions
    }


def _nearest(model: ModelShape, recipe: Recipe, format: str, context: int, limit: int) -> str | None:
    """Return the options of the largest recipe that fits; at last with a shorter context."""
    total = sizes_of(model, store(model, recipe)[0], format, context).total
    at_most: list[tuple[str, int]] = []
    for words, other in smaller(recipe):
        if any(one.matrix.shape[1] % one.group for one in store(model, other)[0] if one.group):
            continue
        size = sizes_of(model, store(model, other)[0], format, context).total
        if size < total:
            at_most.append((words, size))
    for words, size in at_most:
        if memory_of(model, size, context, format).total <= limit:
            return words
    for words, size in [("", total), *at_most]:
        shorter = longest_context(model, size, format, limit)
        if shorter:
            return f"{words} --context {shorter}".strip()
    return None
