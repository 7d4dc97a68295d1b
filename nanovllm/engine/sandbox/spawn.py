"""Start a worker process with one end of a socket. Thread-safe; does not fork."""

import os
import socket
import subprocess
import sys

_START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from nanovllm.engine.sandbox.main import main; main(sys.argv[1], int(sys.argv[2]))"
)


def spawn(kind: str) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start a process that runs `kind` (see main.py). Return it with the parent's socket.

    The process has this one's `sys.path` and its own session. It ends when its socket closes.

    Raises OSError.
    """
    ours, theirs = socket.socketpair()
    try:
        number = 0 if sys.platform == "win32" else theirs.fileno()
        # One arena: others would reserve address space, which counts towards the memory limit.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-I", "-c", _START, kind, str(number), *sys.path]
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
