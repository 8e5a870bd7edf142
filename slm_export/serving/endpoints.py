"""The addresses of the endpoint: chats, completions, embeddings, models."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from slm_export.generation import Sampling
from slm_export.opened import OpenBundle
from slm_export.serving.engine import Engine, QueueFullError, Ticket, Work
from slm_export.serving.errors import ApiError, busy, failed, invalid
from slm_export.serving.messages import ChatRequest, CompletionRequest, EmbeddingRequest, Sampled
from slm_export.serving.writing import Began, Limits, Piece, chat_ids, embed, prompt_ids, write
from slm_export.source.tasks import EMBEDDING, GENERATION

LARGEST_BODY = 8 << 20
_Asked = TypeVar("_Asked", bound=BaseModel)
_T = TypeVar("_T")
_GONE = 499
"""What proxies log of a client that did not wait; nobody receives it."""
Step = tuple[int, Began | Piece]
"""Of several prompts: which one, and what came of it."""


@dataclass(frozen=True)
class Endpoints:
    """The model that is served, and what asks it."""

    engine: Engine
    name: str
    created: int
    """Unix time of the start."""

    @property
    def task(self) -> str:
        """The model's task."""
        return self.engine.model.manifest.model.task

    async def health(self, request: Request) -> Response:
        """Tell that it answers."""
        return JSONResponse({"status": "ok", "model": self.name})

    @property
    def names(self) -> dict[str, str | None]:
        """Names of models -> the adapter that is on: the bundle's own name, and NAME:ADAPTER of each."""
        adapters = self.engine.model.adapters
        return {self.name: None, **{f"{self.name}:{adapter}": adapter for adapter in adapters}}

    async def models(self, request: Request) -> Response:
        """List the model, without an adapter and with each."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        """Describe the model of a name."""
        name = request.path_params["name"]
        self._known(name)
        return JSONResponse(self._model(name))

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked = await self._read(request, ChatRequest, GENERATION)
        messages = [message.for_template() for message in asked.messages]
        limits, adapter = _limits(asked, asked.most), self._known(asked.model)

        def work(opened: OpenBundle) -> Iterator[Step]:
            opened.adapt(adapter)
            return ((0, step) for step in write(opened, chat_ids(opened, messages), limits))

        return await self._texts(request, asked, work, 1, _Shape("chatcmpl", "chat.completion", chat=True))

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked = await self._read(request, CompletionRequest, GENERATION)
        limits, adapter = _limits(asked, asked.max_tokens), self._known(asked.model)

        def work(opened: OpenBundle) -> Iterator[Step]:
            opened.adapt(adapter)
            every = [prompt_ids(opened, prompt) for prompt in asked.prompts]
            for number, ids in enumerate(every):
                for step in write(opened, ids, limits):
                    yield number, step

        shape = _Shape("cmpl", "text_completion", chat=False)
        return await self._texts(request, asked, work, len(asked.prompts), shape)

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        asked = await self._read(request, EmbeddingRequest, EMBEDDING)

        def work(opened: OpenBundle) -> Iterator[tuple[Any, int]]:
            return (embed(opened, text) for text in asked.inputs)

        found = await _while_there(request, self._submit(work), _all)
        if found is None:
            return Response(status_code=_GONE)
        width = found[0][0].numel()
        if asked.dimensions not in (None, width):
            raise ApiError(400, f"this model's embeddings have {width} dimensions", param="dimensions")
        data = [
            {"object": "embedding", "index": number, "embedding": _encoded(vector, asked.encoding_format)}
            for number, (vector, _) in enumerate(found)
        ]
        tokens = sum(count for _, count in found)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def _texts(
        self, request: Request, asked: Sampled, work: Work[Step], choices: int, shape: _Shape
    ) -> Response:
        ticket = self._submit(work)
        head = {
            "id": f"{shape.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            # A prompt that cannot be answered is an error of HTTP, not one in the midst of a stream.
            first = await _while_there(request, ticket, _next)
            if first is None:
                return Response(status_code=_GONE)
            events = _events(ticket, first, shape, head, asked.with_usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        steps = await _while_there(request, ticket, _all)
        if steps is None:
            return Response(status_code=_GONE)
        answers = [shape.whole(number, *_joined(steps, number)) for number in range(choices)]
        return JSONResponse({**head, "object": shape.object, "choices": answers, "usage": _usage(steps)})

    async def _read(self, request: Request, kind: type[_Asked], task: str) -> _Asked:
        """Return a request's body, validated; it must be for this model and this kind of model."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_BODY:
                raise ApiError(413, f"the body has more than {LARGEST_BODY:,} bytes")
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise invalid(error, set(kind.model_fields)) from None
        self._known(asked.model)  # type: ignore[attr-defined]
        if self.task != task:
            raise ApiError(
                400,
                f"{self.name} is a model for {self.task}; this address needs one for {task}",
                param="model",
            )
        return asked

    def _submit(self, work: Work[_T]) -> Ticket[_T]:
        try:
            return self.engine.submit(work)
        except QueueFullError:
            raise busy(self.engine.waiting) from None

    def _known(self, name: str) -> str | None:
        """Return the adapter that a model's name asks for."""
        names = self.names
        if name not in names:
            known = ", ".join(f"'{each}'" for each in names)
            raise ApiError(
                404,
                f"no model '{name}' here; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return names[name]

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "slm-export"}


@dataclass(frozen=True)
class _Shape:
    """How texts are written down: as chats or as completions."""

    prefix: str
    object: str
    chat: bool

    def whole(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a choice of an answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def part(self, index: int, text: str, finish: str | None, *, opens: bool = False) -> dict[str, Any]:
        """Return a choice of a chunk of a stream."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if opens else {}
            said = {"delta": {**role, **({"content": text} if text or opens else {})}}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}


async def _events(
    ticket: Ticket[Step], first: Step, shape: _Shape, head: Mapping[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events (WHATWG HTML, 9.2) until the text ends or the client leaves."""
    document = {**head, "object": "chat.completion.chunk" if shape.chat else shape.object}
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    steps = [first]
    try:
        if shape.chat:
            yield _event({**document, "choices": [shape.part(0, "", None, opens=True)], **usage})
        async for number, step in ticket:
            if isinstance(step, Began) or step.finish:
                steps.append((number, step))
            if isinstance(step, Piece) and (step.text or step.finish):
                choice = shape.part(number, step.text, step.finish)
                yield _event({**document, "choices": [choice], **usage})
        if with_usage:
            yield _event({**document, "choices": [], "usage": _usage(steps)})
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the headers are sent; it is told in the stream
        yield _event(failed(error).document())
    finally:
        ticket.give_up()


async def _while_there(request: Request, ticket: Ticket[_T], wanted: Callable[[Ticket[_T]], Any]) -> Any:
    """Return what is wanted of a ticket; None once the client has left, and its work is given up then."""
    waiting = asyncio.ensure_future(wanted(ticket))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    except Exception as error:
        raise failed(error) from error
    finally:
        if not waiting.done():
            ticket.give_up()
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(ticket: Ticket[_T]) -> list[_T]:
    return [item async for item in ticket]


async def _next(ticket: Ticket[_T]) -> _T:
    return await anext(ticket)


def _limits(asked: Sampled, most: int | None) -> Limits:
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    return Limits(most, Sampling(asked.temperature, asked.top_p, seed), asked.stop)


def _joined(steps: list[Step], number: int) -> tuple[str, str | None]:
    """Return the text of a prompt, and why it ends."""
    pieces = [step for of, step in steps if of == number and isinstance(step, Piece)]
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def _usage(steps: list[Step]) -> dict[str, int]:
    read = sum(step.prompt_tokens for _, step in steps if isinstance(step, Began))
    wrote = sum(step.tokens for _, step in steps if isinstance(step, Piece) and step.finish)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def _encoded(vector: Any, encoding: str) -> Any:
    """Return an embedding as numbers, or as the base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
