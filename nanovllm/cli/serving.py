"""The server of `nanovllm serve`: its application, its sockets and its life."""

import asyncio
import contextlib
import json
import logging
import math
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import API_KEY_VARIABLE
from nanovllm.cli.graceful_server import CLOSE_S, GracefulServer
from nanovllm.cli.listening import bind, connection_limits, raise_open_files_limit
from nanovllm.cli.numa import numa_warning
from nanovllm.cli.options import end_stuck_process, engine_parts, load_chat_template, served_names
from nanovllm.cli.security_options import (
    check_certificate,
    is_loopback,
    read_api_keys,
    read_hosts,
    read_origins,
)
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.cli.service_manager import notify
from nanovllm.config import format_bytes, parse_bytes
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.engine.engine_parts import PartOwner
from nanovllm.engine.memory import MemoryPlan
from nanovllm.errors import EngineFaultError, counted
from nanovllm.hub import resolve_models
from nanovllm.model.families.registry import family_of
from nanovllm.model.machine import PHYSICAL_MEMORY
from nanovllm.server.app import create_app
from nanovllm.server.http.access_log import leave_out_routine_requests
from nanovllm.server.http.protocol import watched_protocol
from nanovllm.server.http.request_log import write_log_to
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.service import ServerControl, ServerSettings
from nanovllm.speculative_config import SpeculativeConfig

_SWITCH_INTERVAL_S = 0.0005
"""Interval of GIL hand-overs. The event loop releases the GIL at each system call; with Python's
default of 5 ms it would wait that long for it while another thread parses a body."""
_EXAMPLE_PROMPT, _EXAMPLE_TOKENS = "She smiled and said", 40


@dataclass(frozen=True, slots=True)
class LoadedServer:
    """The parts of a server: the engine, which its application starts and stops."""

    engine: AsyncEngine
    app: ASGIApp
    settings: ServerSettings
    metrics: ServerMetrics
    control: ServerControl


def load_server(options: ServeOptions) -> LoadedServer:
    """Return the server of the options, whose model is loaded when the application starts.

    Raises NanovllmError or ValueError if the model or an option is not valid.
    """
    config = options.engine
    settings = server_settings(options)
    # SIGHUP may add keys to a file; with a single client the policy changes nothing.
    has_several_keys = len(settings.api_keys) > 1 or options.api_key_file is not None
    is_learn = options.learn_folder is not None  # its scheduler knows one order
    if options.scheduling_policy is None and has_several_keys and not is_learn:
        config = replace(config, scheduling_policy="fair")
    folder, config = resolve_models(options.model, config)
    Engine.check(folder, config)  # report errors before a port is opened

    def fail(error: EngineFaultError, thread: int) -> None:
        if not engine.fail(error, thread):  # the event loop's thread, or that of a request's text
            end_stuck_process(error, thread)

    parts = engine_parts(options.learn_folder, config, fail)
    template = load_chat_template(folder, options.chat_template)
    settings = replace(settings, chat_template=template, inspected_folder=folder)
    if settings.log_requests:
        write_log_to(sys.stdout)  # all other messages go to standard error
    metrics = ServerMetrics(settings.model_names[0])
    engine = AsyncEngine(
        lambda: Engine.load(folder, config, parts),
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        max_logprobs_bytes=parse_bytes(options.max_queued_logprobs_memory),
        on_step=metrics.on_step,
    )
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    control = ServerControl(engine, settings.api_keys)
    app = create_app(engine, settings, metrics, control)
    return LoadedServer(engine, app, settings, metrics, control)


def serve(options: ServeOptions) -> int:
    """Serve until a signal arrives; return 1 if the model or the port cannot be used."""
    loaded = load_server(options)
    engine, settings = loaded.engine, loaded.settings
    max_connections, backlog = connection_limits(raise_open_files_limit())
    http = uvicorn.Config(
        loaded.app,
        http=watched_protocol(settings.stalled_client_s, max_connections),
        backlog=backlog,
        proxy_headers=False,  # any client can forge them
        ws="none",
        host=options.host,
        port=options.port,
        log_level=options.log_level,
        access_log=not settings.log_requests,
        timeout_graceful_shutdown=options.shutdown_timeout_s + 3 * CLOSE_S,
        server_header=False,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    leave_out_routine_requests()
    if not settings.api_keys and not is_loopback(options.host):
        print_message(
            f"warning: {options.host} can be reached from other machines and there are no API "
            f"keys, so anybody may use this server; set {API_KEY_VARIABLE}, or leave --host out"
        )
    if warning := numa_warning("nanovllm serve"):
        print_message(warning)
    sockets = bind(options.host, options.port)
    server = GracefulServer(http, engine, loaded.control, options)
    code = asyncio.run(_serve(server, sockets, loaded, shell_key(options, len(settings.api_keys))))
    if loaded.control.work.is_busy or engine.has_thread:
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


def server_settings(options: ServeOptions) -> ServerSettings:
    """Return the settings of the options and the environment; raises ValueError."""
    if options.log_prompts and not options.log_requests:
        raise ValueError(
            "--log-prompts needs --log-requests, whose lines the prompts are a part of"
        )
    check_certificate(options.ssl_certfile, options.ssl_keyfile)
    api_keys = read_api_keys(options.api_key, options.api_key_file, os.environ)
    # A proxy makes every client local, so that the address tells nothing where there are keys.
    is_local = is_loopback(options.host) and not api_keys
    controls = options.inspector_controls
    timeout_s = options.request_timeout_s
    return ServerSettings(
        model_names=served_names(options.model, options.served_model_name),
        api_keys=api_keys,
        allowed_hosts=read_hosts(options.allowed_hosts, options.host, has_keys=bool(api_keys)),
        allowed_origins=read_origins(options.allowed_origins),
        max_body_bytes=options.max_body_bytes,
        request_timeout_s=None if timeout_s == math.inf else timeout_s,
        stalled_client_s=options.stalled_client_s,
        keep_alive_s=options.keep_alive_s,
        has_response_store=options.response_store,
        log_requests=options.log_requests,
        log_prompts=options.log_prompts,
        has_inspector=options.inspector,
        inspector_shows_prompts=options.inspector_shows_prompts,
        inspector_controls=is_local if controls is None else controls,
    )


async def _serve(
    server: GracefulServer, sockets: list[socket.socket], loaded: LoadedServer, key: str | None
) -> int:
    engine, name = loaded.engine, loaded.settings.model_names[0]
    output = sys.stderr if loaded.settings.log_requests else sys.stdout
    serving = asyncio.create_task(server.serve(sockets))
    ready = asyncio.create_task(engine.wait_until_ready())
    listening = asyncio.create_task(server.listening.wait())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
    if engine.state is EngineState.READY and server.started and not server.should_exit:
        summary = describe(engine.engine, name)
        hint = startup_message(server.address, name, engine.engine.max_model_len, key)
        with contextlib.suppress(OSError):  # the terminal was closed
            print(f"{summary}\n\n{hint}\n", file=output, flush=True)
        notify("READY=1")
    elif engine.state is EngineState.FAILED:
        print_message(f"the model cannot be loaded: {engine.failure}")
        server.should_exit = True
    for task in (ready, listening):
        task.cancel()
    await asyncio.gather(ready, listening, return_exceptions=True)
    await serving
    return 1 if engine.failure is not None or not server.started else 0


def describe(engine: Engine, name: str) -> str:
    """Return the startup summary: the model's configuration and the KV cache."""
    model, blocks = engine.model, engine.blocks
    backend = engine.runner.backend
    threads = counted(backend.num_threads, "thread")
    rows = {
        "vocabulary": f"{model.vocab:,} tokens",
        "hidden size": f"{model.d_model:,}",
        "layers": f"{model.layers:,}",
        "heads": f"{model.heads:,} of {model.head_dim}",
        "parameters": f"{model.num_parameters:,}",
        "context": f"{engine.max_model_len:,} tokens",
        "KV cache": f"{engine.cache_tokens:,} tokens in {blocks.num_blocks:,} blocks of "
        f"{blocks.block_size} (up to {engine.memory.cache_bytes / 2**20:,.0f} MiB)",
        **_describe_limit(engine.memory),
        "computes in": f"{backend.weight_dtype} (cache {backend.cache_dtype}), "
        f"backend {engine.parts.name or engine.config.backend}, {threads}",
        **_describe_drafts(engine.config.speculation),
        **_describe_owners(engine.parts.owners),
    }
    return f"{name}, {family_of(model).title} architecture\n" + "\n".join(
        f"  {label:12} {value}" for label, value in rows.items()
    )


def _describe_limit(memory: MemoryPlan) -> dict[str, str]:
    """Return a row for a limit below the machine's memory, if there is one."""
    limit = memory.limit
    if limit is None or limit.name == PHYSICAL_MEMORY:
        return {}
    planned = format_bytes(memory.other_bytes + memory.cache_bytes)
    return {"memory": f"up to {planned} of {format_bytes(limit.num_bytes)} ({limit.name})"}


def _describe_drafts(speculation: SpeculativeConfig | None) -> dict[str, str]:
    """Return a row about speculative decoding, if it is on."""
    if speculation is None:
        return {}
    drafters = ["n-grams"] if speculation.uses_ngrams else []
    drafters += [] if speculation.model is None else [Path(speculation.model).name]
    most = speculation.num_speculative_tokens
    return {"drafts": f"up to {most} tokens of a sequence in a step, by {' and '.join(drafters)}"}


def _describe_owners(owners: Sequence[PartOwner]) -> dict[str, str]:
    """Return rows that say whose code runs, if some of it may be a reader's of the course."""
    readers = [owner.part for owner in owners if owner.is_readers]
    others = [owner.part for owner in owners if not owner.is_readers]
    rows = {"your code": ", ".join(readers) or "nothing yet", "project's": ", ".join(others)}
    return {label: value for label, value in rows.items() if value and owners}


def shell_key(options: ServeOptions, num_keys: int) -> str | None:
    """Return a shell expression for an API key, which shows none; None without keys."""
    if not num_keys:
        return None
    if options.api_key is None and options.api_key_file is not None:
        return f"$(grep -m1 '^[^# ]' {shlex.quote(str(options.api_key_file.absolute()))})"
    is_list = options.api_key is None and num_keys > 1
    return f"${{{API_KEY_VARIABLE}%%,*}}" if is_list else f"${API_KEY_VARIABLE}"


def startup_message(address: str, name: str, max_model_len: int, key: str | None = None) -> str:
    """Return the server's URL and a curl command that fits a context of `max_model_len` tokens.

    `key` is a shell expression for an API key.
    """
    max_tokens = max(1, min(_EXAMPLE_TOKENS, max_model_len // 2))
    body = json.dumps(
        {"model": name, "prompt": _EXAMPLE_PROMPT, "max_tokens": max_tokens}, ensure_ascii=False
    )
    header = f' -H "Authorization: Bearer {key}"' if key is not None else ""
    content_type = "-H 'Content-Type: application/json'"
    return (
        f"Serving on {address} - try:\n"
        f"  curl {address}/v1/completions{header} {content_type} -d {shlex.quote(body)}"
    )
