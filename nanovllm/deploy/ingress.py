"""Ingress: the HTTP side of the application. It runs no model.

It reads the model's name and the prefix from a request's body, and passes the request on as it is.
Every answer but /metrics, /v1/models, /health and its own errors is a replica's.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.cli.options import load_chat_template, served_names
from nanovllm.deploy.asgi import HttpRequest
from nanovllm.deploy.prefix import PrefixReader
from nanovllm.deploy.relay import (
    BodyTooLargeError,
    DisconnectedError,
    read_request,
    relay,
    send_error,
    send_whole,
)
from nanovllm.deploy.replica import parse_arguments
from nanovllm.hub import resolve_model
from nanovllm.server.http.errors import ClientDisconnectedError
from nanovllm.server.http.event_stream import unless_disconnected
from nanovllm.server.metrics import METRICS_MEDIA_TYPE

_METRICS_TIMEOUT_S = 5.0
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.*)")


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the application.

    Attributes:
        names: its names in requests.
        handle: calls its replicas.
        prefix: finds the prefix of a request; None if its routing does not use prefixes.
        max_body_bytes: largest body that its replicas accept.
    """

    names: tuple[str, ...]
    handle: DeploymentHandle
    prefix: PrefixReader | None
    max_body_bytes: int


class Ingress:
    """The class that Ray Serve makes the ingress of (`ray_serve.build`)."""

    def __init__(
        self, arguments: Sequence[Sequence[str]], routing: Sequence[str], *handles: DeploymentHandle
    ) -> None:
        """Load the tokenizers of the models that are routed by prefix.

        Args:
            arguments: the command line of `nanovllm serve` of each model.
            routing: how each model's requests are routed.
            handles: a handle for each model.
        """
        self._served = [
            _served(line, handle, uses_prefix=kind == "prefix")
            for line, kind, handle in zip(arguments, routing, handles, strict=True)
        ]
        self._by_name = {name: served for served in self._served for name in served.names}
        self._max_body_bytes = max(served.max_body_bytes for served in self._served)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application that Ray Serve runs."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # not a method: see
            if scope["type"] == "lifespan":  # how uvicorn tells ASGI 2 from 3
                await _follow_lifespan(receive, send)
            else:
                await self.respond(scope, receive, send)

        return app

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            request = await read_request(scope, receive, self._max_body_bytes)
        except DisconnectedError:
            return
        except BodyTooLargeError:
            await send_error(
                send, 413, f"the body is longer than the limit of {self._max_body_bytes} bytes"
            )
            return
        if request.path == "/metrics":
            await self._send_metrics(send)
        elif request.path == "/v1/models" and len(self._served) > 1:
            await self._send_models(request, send)
        else:
            await self._pass_on(request, receive, send)

    async def _pass_on(self, request: HttpRequest, receive: Receive, send: Send) -> None:
        """Relay a request to a replica of its model until the client disconnects."""
        body = await asyncio.to_thread(_json_object, request.body)
        name = body.get("model") or _name_in_path(request.path)
        served = self._by_name.get(name) if isinstance(name, str) else self._served[0]
        if served is None:
            known = ", ".join(self._by_name)
            await send_error(send, 404, f"the model {name!r:.100} is not served; served: {known}")
            return
        hashes: tuple[bytes, ...] = ()
        if served.prefix is not None and body:
            hashes = await asyncio.to_thread(served.prefix.hashes, request.path, body)
        with suppress(ClientDisconnectedError):
            await unless_disconnected(
                Request({"type": "http"}, receive), relay(served.handle, request, hashes, send)
            )

    async def _send_models(self, request: HttpRequest, send: Send) -> None:
        """Send the lists of models of one replica of each, joined."""
        entries: list[Any] = []
        for served in self._served:
            parts = served.handle.options(stream=True).respond.remote(request)
            content = b"".join([part async for part in parts if isinstance(part, bytes)])
            answer = _json_object(content)
            if "data" not in answer:  # an error, such as a missing API key
                status = int(answer.get("error", {}).get("code", 503))
                await send_error(send, status, str(answer.get("error", {}).get("message", "")))
                return
            entries += answer["data"]
        content = json.dumps({"object": "list", "data": entries}).encode()
        await send_whole(Response(content, media_type="application/json"), send)

    async def _send_metrics(self, send: Send) -> None:
        """Send the metrics of all replicas, each sample with the label `replica`."""
        pages: list[str] = []
        for served in self._served:
            try:
                results = served.handle.broadcast("metrics")
                pages += await results.results_async(timeout_s=_METRICS_TIMEOUT_S)
            except (RayError, TimeoutError):
                continue  # its replicas are starting or gone; the others are still of use
        content = merge_metrics(pages).encode()
        await send_whole(Response(content, media_type=METRICS_MEDIA_TYPE), send)


def merge_metrics(pages: Sequence[str]) -> str:
    """Return pages of metrics as one, with a label `replica` that counts the pages from 0.

    Each metric's HELP and TYPE lines appear once, followed by the samples of all pages.
    """
    comments: dict[str, dict[str, str]] = {}  # by metric, then HELP or TYPE
    samples: dict[str, list[str]] = {}
    for replica, page in enumerate(pages):
        metric = ""
        for line in page.splitlines():
            if line.startswith("#"):
                kind, metric = line.split(" ", 3)[1:3]
                comments.setdefault(metric, {}).setdefault(kind, line)
            elif (match := _SAMPLE.fullmatch(line)) is not None:
                labels = f'replica="{replica}"' + (f",{match[2]}" if match[2] else "")
                samples.setdefault(metric, []).append(f"{match[1]}{{{labels}}} {match[3]}")
    lines = [
        line
        for metric, head in comments.items()
        for line in (*head.values(), *samples.get(metric, ()))
    ]
    return "\n".join(lines) + "\n"


def _served(arguments: Sequence[str], handle: DeploymentHandle, *, uses_prefix: bool) -> Served:
    parsed = parse_arguments(arguments)
    prefix = None
    if uses_prefix and parsed.enable_prefix_caching:
        folder = resolve_model(parsed.model)
        template = load_chat_template(folder, parsed)
        prefix = PrefixReader(folder, parsed.block_size, template)
    return Served(served_names(parsed), handle, prefix, parsed.max_body_bytes)


def _json_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if the content is anything else."""
    try:
        value = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _name_in_path(path: str) -> str | None:
    prefix = "/v1/models/"
    return path[len(prefix) :] if path.startswith(prefix) else None


async def _follow_lifespan(receive: Receive, send: Send) -> None:
    while True:
        phase = (await receive())["type"]
        await send({"type": f"{phase}.complete"})
        if phase == "lifespan.shutdown":
            return
