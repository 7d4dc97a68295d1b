"""`nanovllm serve`: run the OpenAI-compatible server."""

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import API_KEY_VARIABLE
from nanovllm.cli.listening import (
    connection_limits,
    limit_accept_errors,
    listening_options,
    raise_open_files_limit,
)
from nanovllm.cli.options import engine_config, load_chat_template, served_names
from nanovllm.cli.security_options import (
    check_certificate,
    is_loopback,
    read_api_keys,
    read_hosts,
    read_origins,
)
from nanovllm.config import parse_bytes
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.hub import resolve_model
from nanovllm.server.app import ServerSettings, create_app
from nanovllm.server.http.protocol import watched_protocol
from nanovllm.server.http.request_log import write_log_to
from nanovllm.server.http.work import Work
from nanovllm.server.metrics import ServerMetrics

_SWITCH_INTERVAL_S = 0.0005
"""Interval of GIL hand-overs. The event loop releases the GIL at each system call; with Python's
default of 5 ms it would wait that long for it while another thread parses a body."""
_MAX_HANDSHAKE_S = 3600.0
_DRAIN_S = 2
"""Time to send the last bytes after the engine has stopped; then connections are closed."""


@dataclass(frozen=True, slots=True)
class LoadedServer:
    """The parts of a server: the engine, which its application starts and stops."""

    engine: AsyncEngine
    app: ASGIApp
    settings: ServerSettings
    metrics: ServerMetrics
    work: Work


def load_server(parsed: argparse.Namespace) -> LoadedServer:
    """Return the server of the options, whose model is loaded when the application starts.

    Raises NanovllmError or ValueError if the model or an option is not valid.
    """
    config = engine_config(parsed)
    settings = server_settings(parsed)
    if parsed.scheduling_policy is None and len(settings.api_keys) > 1:
        config = replace(config, scheduling_policy="fair")
    folder = resolve_model(parsed.model)
    Engine.check(folder, config)  # report errors before a port is opened
    template = load_chat_template(folder, parsed)
    settings = replace(settings, chat_template=template, inspected_folder=folder)
    if settings.log_requests:
        write_log_to(sys.stderr)
    metrics = ServerMetrics(settings.model_names[0])
    engine = AsyncEngine(
        lambda: Engine.load(folder, config),
        max_queued_requests=parsed.max_queued_requests,
        max_queued_tokens=parsed.max_queued_tokens,
        max_logprobs_bytes=parse_bytes(parsed.max_queued_logprobs_memory),
        on_step=metrics.on_step,
    )
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    work = Work(engine)
    app = create_app(engine, settings, metrics, work)
    return LoadedServer(engine, app, settings, metrics, work)


def run(parsed: argparse.Namespace) -> int:
    """Serve until a signal arrives; return 1 if the model or the port cannot be used."""
    loaded = load_server(parsed)
    engine, settings = loaded.engine, loaded.settings
    name = settings.model_names[0]
    max_connections, backlog = connection_limits(raise_open_files_limit())
    http = uvicorn.Config(
        loaded.app,
        http=watched_protocol(settings.stalled_client_s, max_connections),
        backlog=backlog,
        proxy_headers=False,  # any client can forge them
        ws="none",
        host=parsed.host,
        port=parsed.port,
        log_level=parsed.log_level,
        access_log=not settings.log_requests,
        timeout_graceful_shutdown=parsed.shutdown_timeout_s + 3 * _DRAIN_S,
        server_header=False,
        ssl_certfile=parsed.ssl_certfile,
        ssl_keyfile=parsed.ssl_keyfile,
    )
    if not settings.api_keys and not is_loopback(parsed.host):
        print_message(
            f"warning: {parsed.host} can be reached from other machines and there are no API keys, "
            f"so that anybody may use this server; set {API_KEY_VARIABLE}, or leave --host out"
        )
    server = _Server(
        http, engine, parsed.shutdown_timeout_s, min(settings.stalled_client_s, _MAX_HANDSHAKE_S)
    )
    key = shell_key(parsed, len(settings.api_keys))
    code = asyncio.run(_serve(server, engine, name, key))
    if loaded.work.is_busy or engine.has_thread:
        _end_process(code)
    return code


def _end_process(code: int) -> NoReturn:
    """End the process beside threads that still run.

    Before Python 3.14 the end of the interpreter unwinds the stack of each thread, and a library in
    Rust or C++ in between, such as pydantic, aborts the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def server_settings(parsed: argparse.Namespace) -> ServerSettings:
    """Return the settings of the options and the environment; raises ValueError."""
    if parsed.log_prompts and not parsed.log_requests:
        raise ValueError(
            "--log-prompts needs --log-requests, whose lines the prompts are a part of"
        )
    check_certificate(parsed.ssl_certfile, parsed.ssl_keyfile)
    api_keys = read_api_keys(parsed.api_key, parsed.api_key_file, os.environ)
    return ServerSettings(
        model_names=served_names(parsed),
        api_keys=api_keys,
        allowed_hosts=read_hosts(parsed.allowed_hosts, parsed.host, has_keys=bool(api_keys)),
        allowed_origins=read_origins(parsed.allowed_origins),
        max_body_bytes=parsed.max_body_bytes,
        request_timeout_s=None
        if parsed.request_timeout_s == math.inf
        else parsed.request_timeout_s,
        stalled_client_s=parsed.stalled_client_s,
        log_requests=parsed.log_requests,
        log_prompts=parsed.log_prompts,
        has_inspector=parsed.inspector,
        inspector_shows_prompts=parsed.inspector_shows_prompts,
        inspector_controls=is_loopback(parsed.host)
        if parsed.inspector_controls is None
        else parsed.inspector_controls,
    )


class _Server(uvicorn.Server):
    """uvicorn's server with exit code 0 after a signal; uvicorn raises the signal again.

    Running requests have `shutdown_timeout_s` after the signal. Then the engine stops, which fails
    the remaining requests, and after _DRAIN_S their connections are aborted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        shutdown_timeout_s: float,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self._handshake_timeout_s = handshake_timeout_s
        self.listening = asyncio.Event()
        self._engine = engine
        self._shutdown_timeout_s = shutdown_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        limit_accept_errors(asyncio.get_running_loop())
        tls = {"ssl_handshake_timeout": self._handshake_timeout_s} if self.config.is_ssl else {}
        with listening_options(**tls):
            await super().startup(sockets)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._engine.state is EngineState.READY:
            self._engine.inspector.release()  # end its streams, and a pause
        stopping = asyncio.create_task(self._stop_engine_later())
        await super().shutdown(sockets)
        stopping.cancel()
        if self.force_exit:  # by a second signal
            await self._abort_requests()

    async def _abort_requests(self) -> None:
        """Stop the engine and give clients _DRAIN_S to read its error."""
        tasks = {asyncio.create_task(self._engine.stop()), *self.server_state.tasks}
        await asyncio.wait(tasks, timeout=_DRAIN_S)
        # uvicorn logs each aborted request as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def _stop_engine_later(self) -> None:
        await asyncio.sleep(self._shutdown_timeout_s)
        await self._engine.stop()
        await asyncio.sleep(_DRAIN_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # uvicorn would wait for its client, then log an error

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def address(self) -> str:
        """Return the URL of the listening server."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        # An address that a browser can open.
        loopback = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104
        shown = loopback.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self.config.is_ssl else 'http'}://{shown}:{port}"


async def _serve(server: _Server, engine: AsyncEngine, name: str, key: str | None) -> int:
    serving = asyncio.create_task(_listen(server))
    ready = asyncio.create_task(engine.wait_until_ready())
    listening = asyncio.create_task(server.listening.wait())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
    if engine.state is EngineState.READY and server.started and not server.should_exit:
        print(
            f"{describe(engine.engine, name)}\n\n{startup_message(server.address, name, key)}\n",
            flush=True,
        )
    elif engine.state is EngineState.FAILED:
        print_message(f"the model cannot be loaded: {engine.failure}")
        server.should_exit = True
    for task in (ready, listening):
        task.cancel()
    await asyncio.gather(ready, listening, return_exceptions=True)
    code = await serving
    return 1 if engine.failure is not None else code


async def _listen(server: _Server) -> int:
    try:
        await server.serve()
    except SystemExit as end:  # raised by uvicorn if it cannot bind
        config, reason = server.config, end.__context__
        remedy = "choose an address of this machine by --host, or another port by --port"
        if isinstance(reason, OSError) and reason.errno == errno.EADDRINUSE:
            remedy = "stop the process that listens there, or choose another by --port"
        detail = f": {reason.strerror or reason}" if isinstance(reason, OSError) else ""
        print_message(f"cannot listen on {config.host} port {config.port}{detail}; {remedy}")
        return 1
    return 0 if server.started else 1


def describe(engine: Engine, name: str) -> str:
    """Return the startup summary: the model's configuration and the KV cache."""
    model, blocks = engine.model, engine.blocks
    backend = engine.runner.backend
    cache_bytes = blocks.num_blocks * backend.block_bytes(blocks.block_size)
    threads = "1 thread" if backend.num_threads == 1 else f"{backend.num_threads} threads"
    rows = {
        "vocabulary": f"{model.vocab:,} tokens",
        "hidden size": f"{model.d_model:,}",
        "layers": f"{model.layers:,}",
        "heads": f"{model.heads:,} of {model.head_dim}",
        "parameters": f"{model.num_parameters:,}",
        "context": f"{engine.max_model_len:,} tokens",
        "KV cache": f"{engine.cache_tokens:,} tokens in {blocks.num_blocks:,} blocks of "
        f"{blocks.block_size} (up to {cache_bytes / 2**20:,.0f} MiB)",
        "computes in": f"{backend.weight_dtype} (cache {backend.cache_dtype}), "
        f"backend {engine.config.backend}, {threads}",
    }
    return f"{name}, GPT-2 architecture\n" + "\n".join(
        f"  {label:12} {value}" for label, value in rows.items()
    )


def shell_key(parsed: argparse.Namespace, num_keys: int) -> str | None:
    """Return a shell expression for an API key, which shows none; None without keys."""
    if not num_keys:
        return None
    if parsed.api_key is None and parsed.api_key_file is not None:
        return f"$(grep -m1 '^[^# ]' {shlex.quote(str(parsed.api_key_file.absolute()))})"
    is_list = parsed.api_key is None and num_keys > 1
    return f"${{{API_KEY_VARIABLE}%%,*}}" if is_list else f"${API_KEY_VARIABLE}"


def startup_message(address: str, name: str, key: str | None = None) -> str:
    """Return the server's URL and a curl command; `key` is a shell expression for an API key."""
    body = json.dumps(
        {"model": name, "prompt": "Once upon a time", "max_tokens": 32}, ensure_ascii=False
    )
    header = f' -H "Authorization: Bearer {key}"' if key is not None else ""
    content_type = "-H 'Content-Type: application/json'"
    return (
        f"Serving on {address} - try:\n"
        f"  curl {address}/v1/completions{header} {content_type} -d {shlex.quote(body)}"
    )
