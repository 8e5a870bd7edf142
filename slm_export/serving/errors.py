"""What a client is told when something is wrong, in the form of OpenAI's API."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from slm_export.errors import InputError, SlmExportError, suggestion

BAD_REQUEST = "invalid_request_error"


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. Not frozen: whoever passes an exception on writes its traceback into it."""

    status: int
    """Of HTTP."""
    message: str
    type: str = BAD_REQUEST
    param: str | None = None
    """The field of the request that it is about."""
    code: str | None = None
    retry_after_s: int | None = None

    def document(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def busy(waiting: int) -> ApiError:
    """Return what is said when the queue is full."""
    return ApiError(
        503,
        f"{waiting} requests are waiting already, and no more may; try again soon, or give `slm-export serve` a larger "
        "--queue",
        type="overloaded_error",
        code="queue_full",
        retry_after_s=1,
    )


def failed(error: Exception) -> ApiError:
    """Return what is said of a work that failed; a mistake of ours goes to the log, with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        too_long = "the context holds" in str(error) or "takes at most" in str(error)
        return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, SlmExportError):
        return ApiError(500, str(error), type="server_error")
    traceback.print_exception(error)
    return ApiError(500, "slm-export itself is at fault; its log has more", type="server_error")


def invalid(error: ValidationError, known: set[str]) -> ApiError:
    """Return the first thing that is wrong with a request; ``known`` are its fields."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" and where is not None:
        return ApiError(400, f"unknown field '{where}'{suggestion(where, known)}", param=where)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {said}")
    return ApiError(400, f"{where}: {said}" if where else said, param=where)
