"""Start a worker process with one end of a socket. Thread-safe; does not fork."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

_START = (
    "import sys; sys.path[:] = sys.argv[4:]; from importlib import import_module; "
    "import_module(sys.argv[1]).main(sys.argv[2], int(sys.argv[3]))"
)


def spawn(
    kind: str,
    module: str = "nanovllm.engine.sandbox.main",
    variables: Mapping[str, str] | None = None,
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start a process that runs `module.main(kind, number)`. Return it with the parent's socket.

    The process has this one's `sys.path` and its own session. It ends when its socket closes.

    Args:
        kind: what the process does; see main.py.
        module: its entry point; `number` is the file descriptor of the socket.
        variables: more environment variables.

    Raises:
        OSError: the process cannot be started.
    """
    ours, theirs = socket.socketpair()
    try:
        number = 0 if sys.platform == "win32" else theirs.fileno()
        # One arena: others would reserve address space, which counts towards the memory limit.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", **(variables or {})}
        command = [sys.executable, "-I", "-c", _START, module, kind, str(number), *sys.path]
        if sys.platform == "win32":
            process = subprocess.Popen(  # noqa: S603 - this Python, trusted arguments
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(theirs.share(process.pid))
        else:
            process = subprocess.Popen(  # noqa: S603 - this Python, trusted arguments
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number],
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def end(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    """Kill a process that `spawn` started, and close its socket. Idempotent."""
    process.kill()
    connection.close()
    process.wait()
