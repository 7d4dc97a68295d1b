"""uvicorn's server, which stops and reloads at signals as load balancers and systemd expect."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from nanovllm.cli.listening import limit_accept_errors, listening_options
from nanovllm.cli.reload import reload_credentials
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.cli.service_manager import Terminal, notify
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.server.service import ServerControl

CLOSE_S = 2
"""Time to send the last bytes after the engine has stopped; then connections are closed."""
_MAX_HANDSHAKE_S = 3600.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104
"""Addresses that a browser can open, for those that stand for all."""
_logger = logging.getLogger("uvicorn.error")


class GracefulServer(uvicorn.Server):
    """uvicorn's server with exit code 0 after a signal; uvicorn raises the signal again.

    After SIGTERM or SIGINT the server drains for the drain delay: a pause ends, it serves requests,
    but /health is 503. Running requests then have the shutdown timeout. Then the engine stops,
    which fails the remaining requests, and after CLOSE_S their connections are aborted. SIGHUP
    reads the API keys and the certificate again.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        control: ServerControl,
        options: ServeOptions,
    ) -> None:
        """Serve the application of `config`, which starts and stops `engine`."""
        super().__init__(config)
        self.listening = asyncio.Event()
        self._engine = engine
        self._control = control
        self._options = options
        self._hangup = asyncio.Event()
        self._terminal = Terminal()
        self._ignores_hangup = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and listen."""
        limit_accept_errors(self._loop)
        handshake_s = min(self._options.stalled_client_s, _MAX_HANDSHAKE_S)
        tls = {"ssl_handshake_timeout": handshake_s} if self.config.is_ssl else {}
        with listening_options(**tls):
            await super().startup(sockets)
        others = " and all other addresses" if self._bound[0] in _LOOPBACK else ""
        _logger.info("Listening on %s%s, loading the model", self.address, others)
        self.listening.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: after the drain delay if this is the first signal, otherwise now."""
        is_first = not self.should_exit and not self._control.is_draining
        if is_first and self._options.drain_delay_s and self._engine.state is EngineState.READY:
            self._control.is_draining = True
            self._loop.call_soon_threadsafe(self._drain)
        else:
            super().handle_exit(sig, frame)

    def _drain(self) -> None:
        """End a pause, let every response close its connection, and stop after the delay."""
        _logger.info(
            "Draining for %g s: /health is 503, requests are served; a second signal ends this",
            self._options.drain_delay_s,
        )
        for headers in (self.config.encoded_headers, self.server_state.default_headers):
            headers.append((b"connection", b"close"))
        if self._engine.state is EngineState.READY:
            self._engine.inspector.end_pause()
        self._loop.call_later(self._options.drain_delay_s, setattr, self, "should_exit", True)

    def _handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._hangup.set)

    async def _reload_on_hangup(self) -> None:
        """Reload after each SIGHUP; stop if it says that the terminal was closed."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            if self._terminal.was_closed() and not self._ignores_hangup:
                _logger.warning("The terminal was closed")
                self.handle_exit(signal.SIGHUP, None)
                continue
            try:
                done = await asyncio.to_thread(
                    reload_credentials, self._options, self.config, self._control
                )
            except (OSError, ValueError) as error:
                _logger.error("SIGHUP: %s; the old API keys and certificate stay in use", error)
            else:
                _logger.info(
                    "SIGHUP: %s", f"read {done} again" if done else "there is nothing to reload"
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and let running requests end within the shutdown timeout."""
        notify("STOPPING=1")
        if self._engine.state is EngineState.READY:
            self._engine.inspector.release()  # end its streams, and a pause
        stopping = asyncio.create_task(self._stop_engine_later())
        await super().shutdown(sockets)
        stopping.cancel()
        if self.force_exit:  # by a second signal
            await self._abort_requests()

    async def _abort_requests(self) -> None:
        """Stop the engine and give clients CLOSE_S to read its error."""
        tasks = {asyncio.create_task(self._engine.stop()), *self.server_state.tasks}
        await asyncio.wait(tasks, timeout=CLOSE_S)
        _logger.setLevel(logging.CRITICAL)  # uvicorn logs each aborted request as an error

    async def _stop_engine_later(self) -> None:
        await asyncio.sleep(self._options.shutdown_timeout_s)
        await self._engine.stop()
        await asyncio.sleep(CLOSE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # uvicorn would wait for its client, then log an error

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and SIGHUP in the context."""
        self._loop = asyncio.get_running_loop()
        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self.handle_exit)
        if hasattr(signal, "SIGHUP"):  # Windows has none
            # Under nohup, which ignores the signal, the server outlives its terminal.
            self._ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            handlers[signal.SIGHUP] = self._handle_hangup
        previous = {number: signal.signal(number, handlers[number]) for number in handlers}
        reloading = self._loop.create_task(self._reload_on_hangup())
        try:
            yield
        finally:
            reloading.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def _bound(self) -> tuple[str, int]:
        """The host and the port of the listening socket."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return host, port

    @property
    def address(self) -> str:
        """Return the URL of the listening server."""
        host, port = self._bound
        shown = _LOOPBACK.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self.config.is_ssl else 'http'}://{shown}:{port}"
