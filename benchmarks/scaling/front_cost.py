"""Measure the CPU time that Ray Serve's proxy and the ingress take for a request and for a token.

Run: python -m benchmarks.scaling.front_cost --save benchmarks/scaling/front.json
     (needs the extra ray, and Linux's /proc)

Whole responses of one token are counted first, then streams of --tokens tokens, by --clients
clients at a time. What a stream costs more than a request, divided by its tokens, is the cost of a
token. CPU time, not wall time, so that other programs count little.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.options import finish, new_parser
from benchmarks.scaling.cost_model import FrontCost
from benchmarks.scaling.deployments import Deployment, deploy, ray_cluster
from nanovllm.cli.argument_types import positive
from nanovllm.config import BUNDLED_MODEL

_PROCESSES = {"proxy": "ray::ProxyActor", "ingress": "ray::ServeReplica:nanovllm:ingress"}
Seconds = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report and save."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL, help="folder or name (%(default)s)")
    parser.add_argument("--requests", type=positive, default=200, help="of each (%(default)s)")
    parser.add_argument("--clients", type=positive, default=4, help="(%(default)s)")
    parser.add_argument("--tokens", type=positive, default=64, help="of a stream (%(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the costs")
    parsed = parser.parse_args(arguments)
    with ray_cluster(1) as port:
        deployment = deploy(port, {"models": [{"model": parsed.model}]})
        send(deployment, parsed, {"max_tokens": 1})  # warm up
        request = send(deployment, parsed, {"max_tokens": 1})
        stream = send(
            deployment, parsed, {"max_tokens": parsed.tokens, "ignore_eos": True, "stream": True}
        )
    cost = front_cost(request, stream, parsed.tokens)
    print(f"one ingress passes up to {cost.ingress_capacity(parsed.tokens):.0f} such streams/s")
    if parsed.save is not None:
        cost.save(parsed.save)
    record: dict[str, Any] = {"benchmark": "front_cost", "request_s": request, "stream_s": stream}
    finish(record, parsed)
    return 0


def front_cost(request: Seconds, stream: Seconds, tokens: int) -> FrontCost:
    """Return the costs, from the seconds of a request and of a stream of each process."""

    def token(name: str) -> float:
        return max(0.0, stream[name] - request[name]) / tokens

    return FrontCost(request["proxy"], token("proxy"), request["ingress"], token("ingress"))


def send(deployment: Deployment, parsed: argparse.Namespace, fields: dict[str, Any]) -> Seconds:
    """Send the requests; return the CPU seconds of each process for one of them."""

    def ask(number: int) -> None:
        body = {"prompt": [number % 100 + 1] * 8, "temperature": 0, **fields}
        status, content = deployment.ask("/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"{body} was answered with {status}: {content[:500]!r}")

    before = cpu_seconds()
    with ThreadPoolExecutor(parsed.clients) as threads:
        list(threads.map(ask, range(parsed.requests)))
    after = cpu_seconds()
    return {name: (after[name] - before[name]) / parsed.requests for name in _PROCESSES}


def cpu_seconds() -> Seconds:
    """Return the CPU time of the processes of this Ray session, found by their names."""
    listing = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[1:]
    rows = [line.split(None, 2) for line in listing]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = dict.fromkeys(_PROCESSES, 0.0)
    for pid, parent, name in rows:
        is_ours = parents.get(int(parent)) == os.getpid()  # its parent is the raylet
        for process, beginning in _PROCESSES.items():
            if is_ours and name.startswith(beginning):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                seconds[process] += (int(fields[11]) + int(fields[12])) / ticks
    missing = [process for process, spent in seconds.items() if spent == 0]
    if missing:
        raise RuntimeError(f"the processes {', '.join(missing)} were not found")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
