"""Good files made bad, by what they are: JSON, TOML, safetensors, or any bytes.

Every function draws from a random source alone (`random.Random`, or Hypothesis' own, which shrinks), so that an input
is known by its number.
"""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

CANARY = "EXECUTED"
"""A folder of this name is made by code in a hostile file, where that code is executed."""

_CODE = (
    f"__import__('os').mkdir('{CANARY}')",
    f"{{{{ cycler.__init__.__globals__.os.mkdir('{CANARY}') }}}}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ 'x' * 10**11 }}",
    "{{ ('x' * 10**9) | length }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    f"!!python/object/apply:os.mkdir ['{CANARY}']",
)
_PATHS = (
    "../outside/secret",
    "../outside/model.safetensors",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "",
    "a/../../outside/secret",
    "a\\..\\b",
    "C:\\secret",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "nul\0byte",
    "x" * 5000,
)
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
    -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "0", "NaN", "\ud800", "\u202e", "\x00", "x" * 100_000, [], {}, [None], [[]], {"": None},
    [1, "a", None], {"a": {"a": {}}}, ["a"] * 1000,
)  # fmt: skip
_INTEGERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def hostile_value(random: Random) -> Any:
    """Return a value that no file of ours has in that place."""
    pool = random.choice((_NUMBERS, _NUMBERS, _VALUES, _PATHS, _CODE))
    return copy.deepcopy(random.choice(pool))


def bytes_mutation(data: bytes, random: Random) -> bytes:
    """Flip, cut, repeat, splice or overwrite some bytes."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        made = _one_of_bytes(made, random)
    return bytes(made)


def _one_of_bytes(made: bytearray, random: Random) -> bytearray:
    if not made:
        return bytearray(random.choice((b"", b"\0", b"\xff" * 64)))
    # The head of a file says how long the rest is: half of all changes are there.
    at = random.randrange(min(len(made), 256) if random.random() < 0.5 else len(made))
    kind = random.randrange(8)
    if kind == 0:
        made[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        made[at] = random.randrange(256)
    elif kind == 2:
        del made[at:]
    elif kind == 3:
        del made[at : at + random.randrange(1, 64)]
    elif kind == 4:
        other = random.randrange(len(made))
        made[at:at] = made[other : other + random.randrange(1, 64)]
    elif kind == 5:
        width = random.choice((1, 2, 4, 8))
        number = random.choice(_INTEGERS) % (1 << 8 * width)
        made[at : at + width] = number.to_bytes(width, "little")
    elif kind == 6:
        other, width = random.randrange(len(made)), random.choice((2, 4, 8, 32))
        made[at : at + width] = made[other : other + width]
    else:
        made += bytes(random.randrange(1, 64))
    return made


def json_mutation(data: bytes, random: Random) -> bytes:
    """Put hostile values, keys and nesting into a JSON document, now and then bytes that are no JSON."""
    if random.random() < 0.1:
        return bytes_mutation(data, random)
    document = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = _changed(document, random)
    text = json.dumps(document, ensure_ascii=random.random() < 0.7)
    return _as_text(text, random).encode("utf-8", "surrogatepass")


def _changed(document: Any, random: Random) -> Any:
    """Return the document with one node of it replaced, removed, renamed or doubled."""
    holder, key = _place(document, random)
    if holder is None:
        return hostile_value(random)
    kind = random.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice((str(hostile_value(random))[:200], *map(str, holder)))] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]] if random.random() < 0.5 else {"": holder[key]}
    elif kind == 3:
        other, name = _place(document, random)
        holder[key] = hostile_value(random) if other is None else json.loads(json.dumps(other[name]))
    else:
        holder[key] = hostile_value(random)
    return document


def _place(document: Any, random: Random) -> tuple[Any, Any]:
    """Return a container and a key or index in it; (None, None) for the document itself."""
    holder, key, value = None, None, document
    while isinstance(value, dict | list) and value and (holder is None or random.random() < 0.75):
        holder = value
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        value = holder[key]
    return (None, None) if random.random() < 0.02 else (holder, key)


def _as_text(text: str, random: Random) -> str:
    kind = random.randrange(24)
    if kind == 0 and (found := re.search(r'"[^"]*": ', text)):  # a key twice
        return (
            text[: found.start()]
            + found[0]
            + json.dumps(hostile_value(random))
            + ", "
            + text[found.start() :]
        )
    if kind == 1:
        depth = random.choice((100, 2000, 200_000))
        return re.sub(r": (\d+|null|true|false)", lambda _: ": " + "[" * depth + "]" * depth, text, count=1)
    if kind == 2:
        return re.sub(
            r": \d+", ": " + random.choice(("1" * 5000, "1e999999", "-", "0x10", "01", "1.")), text, count=1
        )
    if kind == 3:
        return "\ufeff" + text
    if kind == 4:
        return text + random.choice(("\n{}", "\0", "]", "//", text))
    return text


def toml_mutation(data: bytes, random: Random) -> bytes:
    """Put hostile values and keys into a TOML document, now and then bytes that are no TOML."""
    if random.random() < 0.1:
        return bytes_mutation(data, random)
    lines = data.decode().splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(lines))
        key, sign, _ = lines[at].partition(" = ")
        kind = random.randrange(6)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, random.choice(lines))
        elif kind == 2 and sign:
            lines[at] = f"{_toml(str(hostile_value(random))[:300])} = {_toml(hostile_value(random))}"
        elif sign:
            lines[at] = f"{key} = {_toml(hostile_value(random))}"
        else:
            lines[at] = random.choice(
                ("[", "[[recipe]]", "[a.b]", "[memory]", '["\\u0000"]', "x = " + "[" * 5000, "a.b.c = 1")
            )
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    if value is None:
        return "null"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def safetensors_mutation(data: bytes, random: Random) -> bytes:
    """Change the header's JSON, with its length told rightly or not; now and then any byte."""
    if random.random() < 0.2:
        return bytes_mutation(data, random)
    (length,) = struct.unpack("<Q", data[:8])
    header = json_mutation(data[8 : 8 + length], random)
    told = len(header) if random.random() < 0.8 else random.choice(_INTEGERS)
    return struct.pack("<Q", told % (1 << 64)) + header + data[8 + length :]


def jsonl_mutation(data: bytes, random: Random) -> bytes:
    """Change one line of JSON lines."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = json_mutation(lines[at], random) if lines[at] else bytes_mutation(lines[at], random)
    return b"\n".join(lines)


MUTATIONS: dict[str, Mutation] = {
    ".json": json_mutation,
    ".jsonl": jsonl_mutation,
    ".toml": toml_mutation,
    ".safetensors": safetensors_mutation,
}
"""By a file's ending; what is not here is bytes."""


def spoil(folder: Path, names: tuple[str, ...], random: Random) -> None:
    """Change one of the files of a folder, or put something else in its place."""
    path = folder / random.choice(names)
    if random.random() < 0.03:
        _exchange(path, random)
        return
    mutation = MUTATIONS.get(path.suffix, bytes_mutation)
    path.write_bytes(mutation(path.read_bytes(), random))


def _exchange(path: Path, random: Random) -> None:
    """Put nothing, a folder, a pipe or a link where a file was."""
    path.unlink()
    kind = random.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.touch()
    elif kind < 6:
        path.symlink_to(
            random.choice(("/dev/zero", "/etc/passwd", path.name, "../outside/secret", "nowhere"))
        )
