"""What uvicorn's access log leaves out: files of the inspector and checks of the health.

One visit of the page loads about 90 files, and asks for the health every few seconds. On a terminal
this hides the address of the server and the requests of clients. Failures are always logged.
"""

import logging

_LOGGER = "uvicorn.access"
_HEALTH = ("/health", "/ping")
_ASSETS = "/inspector/"
_NUM_ARGUMENTS = 5  # address, method, path, HTTP version, status


class RoutineFilter(logging.Filter):
    """Drops successful GET and HEAD requests for assets and health."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record of uvicorn's access log is written."""
        arguments = record.args
        if not isinstance(arguments, tuple) or len(arguments) != _NUM_ARGUMENTS:
            return True
        _, method, target, _, status = arguments
        if method not in ("GET", "HEAD") or not isinstance(status, int) or status >= 400:
            return True
        path = str(target).partition("?")[0]
        return not path.startswith(_ASSETS) and path.rstrip("/") not in _HEALTH


def leave_out_routine_requests() -> None:
    """Add the filter to uvicorn's access log, once per process."""
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(each, RoutineFilter) for each in logger.filters):
        logger.addFilter(RoutineFilter())
