"""Read a TOML file into a frozen pydantic model; every problem is an `InputError` that names the key.

    phone.toml: unknown key 'exportr'; did you mean 'exporter'?
    phone.toml: memory.total_gb.value is -1; it must be greater than 0

TOML types are taken as they are: ``bits = "4"`` is text and not silently a number. Lists reach the
model as tuples, so models declare ``tuple[X, ...]``.
"""

from __future__ import annotations

import json
import math
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slm_export.errors import InputError, suggestion

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

MAX_BYTES = 1_000_000
"""No settings file is this large; a model or a log given by mistake is refused before it is parsed."""

MAX_PROBLEMS = 5

MAX_WORDS = 6
"""Up to so many permitted words are all named; of more, only the nearest one is."""

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]

# pydantic's words for a type, in the words of somebody who writes TOML
_WANTED = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list in [ ]",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "path_type": "text in quotes",
    "is_instance_of": "text in quotes",
}


def read_model(path: Path, model: type[Model], label: str | None = None) -> Model:
    """Read the TOML file at ``path`` as a ``model``.

    Args:
        path: the file.
        model: a frozen pydantic model with ``extra="forbid"``.
        label: how messages call the file; by default the path as it was given.

    Raises:
        InputError: the file cannot be read, is not TOML, or does not fit the model.
    """
    label = str(path) if label is None else label
    return parse_model(_read_text(path, label), model, label)


def parse_model(text: str, model: type[Model], label: str) -> Model:
    """Parse TOML text as a ``model``; messages begin with ``label``.

    Raises:
        InputError: the text is not TOML or does not fit the model.
    """
    try:
        raw = tomllib.loads(text)
        _refuse_infinite(raw, label)
        values = _tuples(raw)
    except ValueError as error:
        raise InputError(f"{label}: not valid TOML: {_lower_first(str(error))}") from error
    except RecursionError as error:
        raise InputError(f"{label}: nested too deeply") from error
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        raise InputError(_problems(error, model, label)) from error


def dotted(location: Location) -> str:
    """Return ``("recipe", 1, "bits")`` as ``"recipe[1].bits"``, counting from 0 as TOML readers do."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if part.isprintable() else json.dumps(part)}"
    return text.removeprefix(".")


def _read_text(path: Path, label: str) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{label}: this is a folder, not a TOML file")
        if not stat.S_ISREG(mode):
            # a pipe or a device could block for ever or never end
            raise InputError(f"{label}: this is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{label}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"{label}: cannot be read: {reason}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{label}: larger than {MAX_BYTES // 1_000_000} MB; this cannot be a settings file")
    try:
        return data.decode("utf-8-sig")  # editors on Windows like to write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{label}: not UTF-8 text: byte 0x{data[error.start]:02x} in line {line}") from error


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _refuse_infinite(raw: dict[str, Any], label: str) -> None:
    # TOML can write nan and inf, and a nan passes every comparison unseen
    for where, number in _numbers(raw, ()):
        if not math.isfinite(number):
            raise InputError(f"{label}: {dotted(where)} is {number}; it must be a finite number")


def _numbers(value: Any, where: Location) -> Iterator[tuple[Location, float]]:
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, (*where, index))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _problems(error: ValidationError, model: type[BaseModel], label: str) -> str:
    details = _causes(error.errors(include_url=False), model)
    # an unknown key comes first: it is often the misspelt form of a missing one
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    lines = [f"{label}: {_problem(detail, model)}" for detail in details[:MAX_PROBLEMS]]
    if len(details) > MAX_PROBLEMS:
        lines.append(f"{label}: and {len(details) - MAX_PROBLEMS} more")
    return "\n".join(lines)


def _causes(details: list[ErrorDetails], model: type[BaseModel]) -> list[ErrorDetails]:
    """Drop what only follows from another problem, so that one mistake is one line."""
    failed = {detail["loc"] for detail in details}
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]

    def follows(detail: ErrorDetails) -> bool:
        location = detail["loc"]
        if detail["type"] == "missing":  # there, but misspelt
            siblings = [other for other in unknown if other["loc"][:-1] == location[:-1]]
            return any(f"did you mean '{location[-1]}'?" in _problem(other, model) for other in siblings)
        if detail["type"] == "too_short":  # pydantic leaves out the items that failed
            return any(other[: len(location)] == location for other in failed - {location})
        return False

    return [detail for detail in details if not follows(detail)]


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, location, context = detail["type"], detail["loc"], detail.get("ctx", {})
    where = dotted(location)
    if kind == "extra_forbidden":
        return f"unknown key '{where}'{suggestion(str(location[-1]), _known_keys(model, location[:-1]))}"
    if kind == "missing":
        return f"missing key '{where}'"
    if kind == "value_error":
        return f"{where}: {context['error']}" if where else str(context["error"])
    given = _shown(detail["input"])
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        if len(words) > MAX_WORDS and isinstance(detail["input"], str):
            return f"{where} is {given}{suggestion(detail['input'], words)}"
        return f"{where} is {given}; it must be {context['expected']}"
    if kind in _WANTED:
        return f"{where} is {given}; it must be {_WANTED[kind]}"
    # pydantic's own words for ranges and lengths, which read well: "Input should be greater than 0"
    return f"{where} is {given}; it {_lower(detail['msg'])}"


def _lower(message: str) -> str:
    for opening in ("Input should ", "String should ", "Tuple should ", "Value should "):
        if message.startswith(opening):
            return "must " + message.removeprefix(opening).split(" after validation")[0]
    return f"is not accepted: {message}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    current: type[BaseModel] | None = model
    named = False  # the next part is a name that the user chose
    for part in location:
        if isinstance(part, int) or current is None or named:
            named = False
            continue
        annotation = _by_key(current).get(part)
        current, named = _nested(annotation), get_origin(annotation) is dict
    return list(_by_key(current)) if current is not None else []


def _by_key(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _nested(inner)) is not None:
            return found
    return None
