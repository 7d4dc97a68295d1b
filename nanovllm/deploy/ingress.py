"""Ingress: the HTTP side of the application. It runs no model.

It checks hosts, origins and API keys, then reads the model's name and the prefix from a request's
body, and passes the request on as it is. Every answer is a replica's, except:

    /health       200 while each model has a running replica (health.py); /ping is the same
    /metrics      the metrics of all replicas
    /v1/models    all models, where the application has several

and the ingress's own errors. A host, an origin or a key that one model accepts passes the ingress;
the replica checks it again for its own model. /health and /metrics do not wait behind the requests
of full replicas.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.cli.options import load_chat_template
from nanovllm.cli.serving import server_settings
from nanovllm.deploy.health import ReplicaHealth
from nanovllm.deploy.merged_metrics import merge_metrics
from nanovllm.deploy.prefix import MAX_BODY_BYTES, PrefixReader
from nanovllm.deploy.relay import ask, relay
from nanovllm.deploy.settings import ModelSettings
from nanovllm.hub import resolve_model
from nanovllm.server.http.auth import OPEN_PATHS, ApiKeyMiddleware, ApiKeys, TrustedHostMiddleware
from nanovllm.server.http.body_limit import BodyLimitMiddleware
from nanovllm.server.http.cors import CORSMiddleware
from nanovllm.server.http.errors import ClientDisconnectedError, error_response, shorten
from nanovllm.server.http.event_stream import unless_disconnected
from nanovllm.server.http.request_line import TrailingSlashMiddleware
from nanovllm.server.http.request_log import RequestLogMiddleware
from nanovllm.server.inspector import page
from nanovllm.server.metrics import METRICS_MEDIA_TYPE
from nanovllm.server.service import ServerSettings

INGRESS = "ingress"
"""Name of the ingress's deployment; all others are models."""
_METRICS_TIMEOUT_S = 3.0
_READ_METHODS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the application.

    Attributes:
        settings: the settings of its replicas.
        handle: calls its replicas.
        prefix: finds the prefix of a request; None if its routing does not use prefixes.
    """

    settings: ServerSettings
    handle: DeploymentHandle
    prefix: PrefixReader | None


class Ingress:
    """The class that Ray Serve makes the ingress of (`ray_serve.build`)."""

    def __init__(self, models: Sequence[ModelSettings], *handles: DeploymentHandle) -> None:
        """Load the tokenizers of the models that are routed by prefix.

        Args:
            models: the models.
            handles: a handle for each.
        """
        self._served = [
            _served(model, handle) for model, handle in zip(models, handles, strict=True)
        ]
        self._by_name = {
            name: served for served in self._served for name in served.settings.model_names
        }
        self._pages: dict[int, list[tuple[str, str]]] = {}
        self._health = ReplicaHealth(_running_replicas)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application that Ray Serve runs."""
        checked = _checked(self.respond, [served.settings for served in self._served])

        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # not a method: see
            if scope["type"] == "lifespan":  # how uvicorn tells ASGI 2 from 3
                await _follow_lifespan(receive, send)
            elif scope["type"] == "http":
                path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
                inner = {**scope, "path": path, "root_path": ""}
                await checked(inner, receive, _without_request_id(send))
            else:
                await send({"type": "websocket.close"})  # which refuses the connection

        return app

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request that has passed the checks of `_checked`."""
        path = scope["path"]
        try:
            content = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        body = await asyncio.to_thread(_json_object, content)
        name = body.get("model") or _name_in_path(path)
        served = self._by_name.get(name) if isinstance(name, str) else self._served[0]
        own: Callable[[], Awaitable[Response]] | None = None
        if scope["method"] in _READ_METHODS:
            if path in ("/health", "/ping"):
                own = partial(self._health.response, is_deep=_is_deep(scope["query_string"]))
            elif path == "/metrics":
                own = self._merge_metrics
            elif path == "/v1/models" and len(self._served) > 1:
                own = partial(self._list_models, scope)
        if served is None and own is None:
            own = partial(self._unknown_model, str(name))
        if own is not None:
            await (await own())(scope, receive, send)
            return
        assert served is not None
        hashes: tuple[bytes, ...] = ()
        if served.prefix is not None and body and len(content) <= MAX_BODY_BYTES:
            hashes = await asyncio.to_thread(served.prefix.hashes, path, body)
        answer = relay(served.handle, scope, content, hashes, receive, send)
        with suppress(ClientDisconnectedError):
            await unless_disconnected(Request({"type": "http"}, receive), answer)

    async def _merge_metrics(self) -> Response:
        """Return the metrics of all replicas, each sample with the label `replica`."""
        await asyncio.gather(*map(self._fetch_pages, range(len(self._served))))
        pages = [page for index in sorted(self._pages) for page in self._pages[index]]
        content = await asyncio.to_thread(merge_metrics, pages)
        return Response(content, media_type=METRICS_MEDIA_TYPE)

    async def _fetch_pages(self, index: int) -> None:
        """Fetch the metrics of a model's replicas; keep the last ones if a replica is full.

        A full replica answers once one of its requests has ended.
        """
        with suppress(RayError, RayServeException, TimeoutError):
            results = (
                await self._served[index]
                .handle.broadcast("metrics")
                .results_async(timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True)
            )
            self._pages[index] = [page for page in results if isinstance(page, tuple)]

    async def _list_models(self, scope: Scope) -> Response:
        """Return the models of all replicas to which the request has access."""
        get = {**scope, "method": "GET"}  # a response to HEAD has no content to join
        answers = [await ask(served.handle, get) for served in self._served]
        valid = [answer for answer in answers if answer.status_code == 200]
        entries = [entry for answer in valid for entry in _json_object(bytes(answer.body))["data"]]
        return JSONResponse({"object": "list", "data": entries}) if valid else answers[0]

    async def _unknown_model(self, name: str) -> Response:
        known = ", ".join(self._by_name)
        message = f"the model {shorten(name)!r} is not served here; served: {known}"
        return error_response(404, message, "model")


def _checked(app: ASGIApp, models: Sequence[ServerSettings]) -> ASGIApp:
    """Return `app` behind the checks of the server, which need no body.

    Where one model has API keys, every request needs one of all models' keys: the ingress reads no
    body before that.
    """
    app = BodyLimitMiddleware(
        app,
        max_body_bytes=max(model.max_body_bytes for model in models),
        max_body_s=max(model.stalled_client_s for model in models),
    )
    keys = {key for model in models for key in model.api_keys}
    if keys:
        has_page = any(model.has_inspector for model in models)
        open_paths = OPEN_PATHS | (page.public_paths() if has_page else frozenset())
        app = ApiKeyMiddleware(app, ApiKeys(sorted(keys)), open_paths)
    origins = {origin for model in models for origin in model.allowed_origins}
    if origins:
        app = CORSMiddleware(app, sorted(origins))
    hosts = [model.allowed_hosts for model in models]
    if None not in hosts:
        app = TrustedHostMiddleware(app, [name for names in hosts for name in names or ()])
    return TrailingSlashMiddleware(RequestLogMiddleware(app, log_requests=False))


def _running_replicas() -> list[int]:
    """Return the number of running replicas of each model, as Ray Serve's controller knows it."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return [
        deployment.replica_states.get("RUNNING", 0)
        for name, deployment in application.deployments.items()
        if name != INGRESS
    ]


def _served(model: ModelSettings, handle: DeploymentHandle) -> Served:
    options = model.serve_options()
    prefix = None
    if model.routing == "prefix" and options.engine.enable_prefix_caching:
        folder = resolve_model(options.model)
        template = load_chat_template(folder, options.chat_template)
        prefix = PrefixReader(folder, options.engine.block_size, template)
    return Served(server_settings(options), handle, prefix)


def _is_deep(query: bytes) -> bool:
    return parse_qs(query.decode("latin-1")).get("deep", ["0"])[-1] not in ("0", "false")


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


def _without_request_id(send: Send) -> Send:
    """Return `send` without the replicas' x-request-id: Ray Serve's proxy adds its own."""

    async def send_rest(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": headers}
        await send(message)

    return send_rest
