"""Calls of the worker process of a model folder; see worker.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.engine.sandbox.process import WorkerEndedError
from nanovllm.engine.sandbox.process_pool import ProcessPool, WorkerRefusedError
from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    NanovllmError,
    RequestTimeoutError,
)
from nanovllm.inspection.worker import ONE_THREAD

MAX_CPU_S = 30.0
"""Processor time of a call."""
MAX_LONG_CPU_S = 120.0
"""The same of t-SNE, and of the loss without each part of the network in turn."""
IDLE_TIMEOUT_S = 60.0
_WALL_S_PER_CPU_S = 4.0  # a busy machine leaves a process of the lowest priority little time


class InspectionWorker:
    """Runs inspections of one model in a process. Thread-safe; calls run one after the other.

    The process starts with the first call and ends after an idle time. One that crashed or exceeded
    a limit is replaced at the next call.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_cpu_s: float = MAX_CPU_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        """Start nothing yet.

        Args:
            folder: the model.
            max_cpu_s: maximum processor time of a call; a long one has MAX_LONG_CPU_S instead.
            idle_timeout_s: time without a call after which the process ends.
        """
        self._max_cpu_s = max_cpu_s
        self._is_closed = False
        self._pool = ProcessPool(
            "nanovllm.inspection.worker",
            {"op": "load", "folder": str(folder)},
            idle_s=idle_timeout_s,
            variables=ONE_THREAD,
        )

    def run(self, name: str, arguments: Mapping[str, Any]) -> bytes:
        """Return the JSON of `responses.run`; it blocks.

        Raises:
            InvalidRequestError: the arguments are invalid, or the call needs too much memory.
            RequestTimeoutError: the call took longer than its limit.
            EngineFaultError: the process failed.
            EngineNotReadyError: the worker is closed.
        """
        is_long = name == "ablation_map" or arguments.get("method") == "tsne"
        cpu_s = MAX_LONG_CPU_S if is_long else self._max_cpu_s
        header = {"op": "run", "name": name, "arguments": dict(arguments), "cpu_s": cpu_s}
        try:
            if self._is_closed:
                raise _stopping()
            reply, body = self._pool.call(header, timeout_s=cpu_s * _WALL_S_PER_CPU_S)
        except WorkerRefusedError as error:
            raise _error(error.reply) from None
        except WorkerEndedError as error:
            raise _stopping() if self._is_closed else _ended(error.limit, cpu_s) from None
        except OSError as error:
            raise EngineFaultError(f"the inspection process cannot start: {error}") from error
        if reply["op"] == "failed":
            raise _error(reply)
        return body

    def close(self) -> None:
        """End the process; a running call fails. Idempotent."""
        self._is_closed = True
        self._pool.close(kills=True)

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return next(iter(self._pool.pids), None)


def _stopping() -> EngineNotReadyError:
    return EngineNotReadyError("the server is stopping")


def _ended(limit: str | None, cpu_s: float) -> NanovllmError:
    """Return the error of a call whose process has ended."""
    if limit == "time":
        return RequestTimeoutError(
            f"the inspection took longer than {cpu_s:g} s, the limit; shorten the prompt, or ask "
            "for less",
            has_begun=True,
        )
    if limit == "memory":
        return InvalidRequestError(
            "the inspection process ran out of memory; shorten the prompt, or ask for less"
        )
    return EngineFaultError("the inspection process ended unexpectedly; try again")


def _error(reply: Mapping[str, Any]) -> InvalidRequestError | EngineFaultError:
    if reply["kind"] == "invalid":
        return InvalidRequestError(reply["message"], param=reply["param"])
    return EngineFaultError(reply["message"])
