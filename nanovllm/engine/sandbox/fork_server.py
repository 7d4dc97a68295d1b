"""A process that loads llguidance and the tokenizer, and forks a worker for each grammar.

Workers share the tokenizer's memory. Forking takes milliseconds, loading tenths of a second.

    -> load   see grammar_worker                    <- loaded | failed
    -> fork   id; with the worker's socket          (the worker replies on that)
    -> kill   id
    -> slow   id: lower the worker's priority
                                                    <- exited: id, code

When the socket closes, all workers are killed. This process has one thread, so that it may fork.
"""

import os
import selectors
import signal
import socket
from contextlib import suppress

from nanovllm.engine.sandbox.grammar_worker import Library, load, serve_grammar
from nanovllm.engine.sandbox.messages import Channel, MessageError, MessageReader

_SLOW_NICE = 19


def serve_forks(channel: Channel) -> None:
    """Load, then fork workers and report their exits until the socket closes."""
    library = load(channel)
    if library is not None:
        _ForkServer(channel, library).serve()


class _ForkServer:
    def __init__(self, channel: Channel, library: Library) -> None:
        self._channel = channel
        self._library = library
        self._reader = MessageReader()
        self._sockets: list[int] = []  # received, but their messages are not yet read
        self._workers: dict[int, int] = {}  # {pid: id}
        self._own: list[socket.socket | selectors.BaseSelector] = []  # to close in workers

    def serve(self) -> None:
        wake, woken = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.socket, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            self._own = [self._channel.socket, selector, wake, woken]
            try:
                while True:
                    ready = [key.fileobj for key, _ in selector.select()]
                    if wake in ready:
                        wake.recv(4096)
                    self._reap()
                    if self._channel.socket in ready and not self._handle_messages():
                        return
            finally:
                for pid in self._workers:
                    os.kill(pid, signal.SIGKILL)

    def _handle_messages(self) -> bool:
        """Handle the messages that have arrived. Return False at the end of the stream."""
        data, files, _, _ = socket.recv_fds(self._channel.socket, 1 << 16, 16)
        self._sockets += files
        if not data:
            return False
        for header, _ in self._reader.feed(data):
            if header["op"] == "fork":
                self._fork(header["id"], self._sockets.pop(0))
                continue
            for pid, worker in self._workers.items():
                if worker == header["id"]:
                    with suppress(OSError):
                        if header["op"] == "kill":
                            os.kill(pid, signal.SIGKILL)
                        else:
                            os.setpriority(os.PRIO_PROCESS, pid, _SLOW_NICE)
        return True

    def _fork(self, worker: int, number: int) -> None:
        try:
            pid = os.fork()
        except OSError:  # out of memory or processes: the parent sees the worker's socket close
            os.close(number)
            self._channel.send({"op": "exited", "id": worker, "code": None})
            return
        if pid:
            os.close(number)
            self._workers[pid] = worker
            return
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in self._own:
                inherited.close()
            for other in self._sockets:
                os.close(other)
            with suppress(OSError, MessageError):  # the parent has ended
                serve_grammar(Channel(socket.socket(fileno=number)), self._library)
            os._exit(0)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        """Report the workers that have ended."""
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            self._channel.send({"op": "exited", "id": self._workers.pop(pid), "code": code})
