"""The ASGI application: routes, limits, the key, and streams. Starlette is an extra: pip install 'moec[serve]'."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...errors import MoecError
from ..artifact import Artifact
from ..generate import Runner
from .batches import Batches, Job, Limits, Piece, QueueFullError
from .openai_format import CHAT, COMPLETION, Asked, RefusedError, Writer, error_body, read_request

BODY_SECONDS = 30.0  # in which the body of a request has to come
POLL_SECONDS = 0.5  # between two looks whether a client still waits
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Handler = Callable[[Request], Awaitable[Response]]


def make_application(
    artifact: Artifact, session: Runner, *, model: str, limits: Limits, key: str | None = None, any_host: bool = False
) -> Starlette:
    """Return the application that serves an artifact as `model`.

    With `key` every route but /health wants it as a bearer token. Unless `any_host`, only requests that name this
    machine as their host are answered, so that a web page cannot reach the server through a name of its own.
    """
    padded = "position_ids" in {entry["name"] for entry in artifact.manifest["inputs"]}
    rows = min(limits.batch, artifact.manifest["dims"].get("B", [1, limits.batch])[1])
    bounded = Limits(limits.queue, rows, limits.seconds, limits.body, limits.tokens)
    batches = Batches(session, artifact.tokenizer, artifact.eos, padded, bounded)
    created = int(time.time())
    card = {"id": model, "object": "model", "created": created, "owned_by": "moec"}

    async def show_health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": batches.waiting, "running": batches.running})

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model:
            raise RefusedError(404, f"there is no model {name!r:.80}; this server has {model!r}", "model")
        return JSONResponse(card)

    def completing(kind: str) -> Handler:
        async def complete(request: Request) -> Response:
            body = await _read_body(request, bounded.body)
            # templates and tokenizers of strangers may take their time: other requests are answered meanwhile
            asked = await asyncio.to_thread(read_request, body, kind, artifact, model, session.context, bounded.tokens)
            return await _answer(request, asked, batches, Writer(asked, model), bounded)

        return complete

    routes = [
        Route("/health", show_health),
        Route("/v1/models", _guard(list_models, key)),
        Route("/v1/models/{name:path}", _guard(show_model, key)),
        Route("/v1/chat/completions", _guard(completing(CHAT), key), methods=["POST"]),
        Route("/v1/completions", _guard(completing(COMPLETION), key), methods=["POST"]),
    ]

    @asynccontextmanager
    async def closing(_: Starlette) -> AsyncIterator[None]:
        yield
        batches.close()

    hosts = [] if any_host else [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])]
    return Starlette(
        routes=routes, middleware=hosts, lifespan=closing, exception_handlers={HTTPException: _refuse_route}
    )


async def _refuse_route(_: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
    return JSONResponse(error_body(status, detail), status)


def _guard(handler: Handler, key: str | None) -> Handler:
    """Ask for the key, and answer errors as the OpenAI routes do."""

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            return JSONResponse(error_body(401, "the key is missing or wrong"), 401, {"WWW-Authenticate": "Bearer"})
        try:
            return await handler(request)
        except RefusedError as error:
            return JSONResponse(error.body(), error.status)
        except QueueFullError:
            busy = error_body(429, "too many requests wait; try again later")
            return JSONResponse(busy, 429, {"Retry-After": "5"})
        except ClientDisconnect:
            return Response(status_code=499)

    return guarded


async def _read_body(request: Request, most: int) -> Any:
    """Return the JSON body; RefusedError for one that is too long, too slow, or no JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "the body is not application/json")
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                read += part
                if len(read) > most:
                    raise RefusedError(413, f"the body has more than {most} bytes")
    except TimeoutError:
        raise RefusedError(408, "the body did not come in time") from None
    try:
        return json.loads(read)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {str(error)[:200]}") from None


async def _answer(request: Request, asked: Asked, batches: Batches, writer: Writer, limits: Limits) -> Response:
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def deliver(piece: Piece) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    job = Job(asked.tokens, asked.sampling, asked.stops, deliver, time.monotonic() + limits.seconds)
    batches.submit(job)
    if asked.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(asked, job, pieces, writer), media_type="text/event-stream", headers=headers)
    text: list[str] = []
    while True:
        try:
            piece = await asyncio.wait_for(pieces.get(), POLL_SECONDS)
        except TimeoutError:
            if await request.is_disconnected():
                job.cancelled.set()
                raise ClientDisconnect from None
            continue
        if piece.error is not None:
            return JSONResponse(_error_of(piece.error), 503)
        text.append(piece.text)
        if piece.stopped:
            return JSONResponse(writer.answer("".join(text), piece.stopped, piece.tokens))


async def _stream(asked: Asked, job: Job, pieces: asyncio.Queue[Piece], writer: Writer) -> AsyncIterator[str]:
    """Yield the events of a stream; where the client goes away the request is given up."""
    try:
        if asked.kind == CHAT:
            yield _event(writer.chunk("", first=True))
        while True:
            piece = await pieces.get()
            if piece.error is not None:
                yield _event(_error_of(piece.error))
                return
            if piece.text:
                yield _event(writer.chunk(piece.text))
            if piece.stopped:
                break
        yield _event(writer.chunk(None, piece.stopped))
        if asked.usage:
            yield _event(writer.last_chunk(piece.tokens))
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled.set()


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error_of(error: Exception) -> dict[str, Any]:
    return error_body(503, error.what if isinstance(error, MoecError) else f"moec failed: {type(error).__name__}")
