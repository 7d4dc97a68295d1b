"""Messages to the service manager and the terminal that started the server."""

import contextlib
import errno
import os
import socket
import sys


def notify(state: str) -> None:
    """Send a state such as READY=1 to systemd (sd_notify(3)); do nothing without it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # a name in the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages:
        messages.sendto(state.encode(), address)


class Terminal:
    """The controlling terminal of this process, if it has one."""

    def __init__(self) -> None:
        self._is_open = _has_terminal()
        streams = (sys.stdout, sys.stderr)
        self._streams = [stream for stream in streams if stream is not None and stream.isatty()]

    def was_closed(self) -> bool:
        """Return once whether the terminal was closed; output to it is discarded from then on."""
        if not self._is_open or _has_terminal():
            return False
        self._is_open = False
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in self._streams:
            os.dup2(null, stream.fileno())
        os.close(null)
        return True


def _has_terminal() -> bool:
    """Return whether the terminal can be opened, or is not known to be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)  # a busy server has too many files open
    return True
