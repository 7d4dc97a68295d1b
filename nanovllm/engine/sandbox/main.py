"""Entry point of a worker process; see process.py."""

import os
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module

from nanovllm.engine.sandbox.limits import MEMORY_EXIT_CODE, limit_resources
from nanovllm.engine.sandbox.messages import Channel, MessageError


def main(module: str, number: int, note: int) -> None:
    """Run `module.serve(channel)`, which returns once its socket has closed.

    `number` and `note` are the file descriptors of the socket and of the file for notes, which is
    -1 where there is none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if sys.platform == "win32":
        connection = socket.fromshare(sys.stdin.buffer.read())
    else:
        connection = socket.socket(fileno=number)
    limit_resources()
    with suppress(OSError, MessageError):  # the parent has ended
        try:
            import_module(module).serve(Channel(connection, note))
        except MemoryError:
            os._exit(MEMORY_EXIT_CODE)
    os._exit(0)
