"""The worker process: observes prompts of one model folder, one job at a time.

    -> load  folder               <- loaded
    -> run   name, arguments,     <- done; body: the response as JSON
             cpu_s
                                  <- failed: kind, message, param

The messages are those of engine/sandbox/messages.py. `name` and `arguments` are those of
`responses.run`. Jobs have the lowest priority and one thread, so a server beside them keeps its
processor time. The process ends if a job takes more than `cpu_s` of processor time, if it runs out
of memory, and when its socket closes. `responses.run` refuses a job that needs too much memory; the
limit of the process is for what it does not foresee.
"""

import json
import os
from pathlib import Path
from typing import Any

from nanovllm.engine.sandbox.limits import limit_memory, limited_cpu
from nanovllm.engine.sandbox.messages import Channel
from nanovllm.errors import CheckpointError, EngineFaultError, InvalidRequestError
from nanovllm.inspection import memory, responses
from nanovllm.inspection.observe import InspectedModel

ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Environment of the process: the libraries read these variables when they are loaded."""
_NICE = 19
_HEADROOM_BYTES = 512 << 20  # for libraries that are loaded later, and for the allocator


def serve(channel: Channel) -> None:
    """Load the model of the first message, then run jobs until the socket closes."""
    if hasattr(os, "nice"):
        os.nice(_NICE)
    received = channel.receive()
    if received is None:
        return
    try:
        model = InspectedModel.load(Path(received[0]["folder"]))
    except (CheckpointError, OSError) as error:
        _send_error(channel, error)
        return
    limit_memory(memory.MAX_MEMORY_BYTES + memory.layers_bytes(model.config) + _HEADROOM_BYTES)
    channel.send({"op": "loaded"})
    while (received := channel.receive()) is not None:
        header, _ = received
        try:
            with limited_cpu(header["cpu_s"]):
                body = encode(responses.run(model, header["name"], header["arguments"]))
        except (InvalidRequestError, EngineFaultError, CheckpointError) as error:
            _send_error(channel, error)
        else:
            channel.send({"op": "done"}, body)


def encode(response: dict[str, Any]) -> bytes:
    """Return a response as JSON."""
    return json.dumps(response, separators=(",", ":"), allow_nan=False).encode("ascii")


def _send_error(channel: Channel, error: Exception) -> None:
    param = getattr(error, "param", None)
    kind = "invalid" if isinstance(error, InvalidRequestError) else "fault"
    channel.send({"op": "failed", "kind": kind, "message": str(error), "param": param})
