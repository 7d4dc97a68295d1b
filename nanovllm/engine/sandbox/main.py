"""Entry point of a worker process; see spawn.py."""

import contextlib
import os
import signal
import socket
import sys

from nanovllm.engine.sandbox.limits import limit_resources
from nanovllm.engine.sandbox.messages import Channel, MessageError


def main(kind: str, number: int) -> None:
    """Run a worker of this kind until its socket, file descriptor `number`, closes."""
    channel = open_channel(number)
    with contextlib.suppress(OSError, MessageError):  # the parent has ended
        if kind == "fork-server":
            from nanovllm.engine.sandbox.fork_server import serve_forks  # noqa: PLC0415

            serve_forks(channel)
        elif kind == "grammar":
            from nanovllm.engine.sandbox.grammar_worker import load, serve_grammar  # noqa: PLC0415

            library = load(channel)
            if library is not None:
                serve_grammar(channel, library)
        elif kind == "template":
            from nanovllm.engine.sandbox.template_worker import serve_template  # noqa: PLC0415

            serve_template(channel)
    os._exit(0)


def open_channel(number: int) -> Channel:
    """Return the channel to the parent, with the limits of a worker applied to this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if sys.platform == "win32":
        connection = socket.fromshare(sys.stdin.buffer.read())
    else:
        connection = socket.socket(fileno=number)
    limit_resources()
    return Channel(connection)
