"""Measure the cost of watching the engine: processor time per token with and without a reader.

Run: python benchmarks/inspector_cost.py --threads 1

A server process has a steady load of concurrent streams, without a break. In each round it is
measured twice, with and without one reader of GET /v1/engine/events, in random order, each after a
random delay. The cost of a round is the ratio of the server's processor time per token. It varies
by some 10%, mostly because the processor does, so measurements are short, so that both of a round
see the same processor, and rounds are many. The result is the geometric mean of all rounds, with
its standard error. The server ends recording LEASE_S after its last reader, 10 s in production. The
last line is JSON.
"""

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load.server_process import ServerProcess
from benchmarks.options import add_run_options, finish, heading, tell
from nanovllm.cli.argument_types import positive, positive_number
from nanovllm.server.inspector.event_stream import MAX_INTERVAL_S

LEASE_S = 0.1
SETTLE_S = 0.2
"""Time until the last reader's recording has ended, or the first event has been sent."""
_TIMEOUT_S = 120.0
_JSON = {"Content-Type": "application/json"}


@dataclass(slots=True)
class Reader:
    """What a reader of the events has received."""

    frames: int = 0
    num_bytes: int = 0
    is_ended: threading.Event = field(default_factory=threading.Event)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-books", help="model of the server (%(default)s)")
    parser.add_argument(
        "--streams",
        type=lambda text: [positive(part) for part in text.split(",")],
        default=[1, 16],
        help="numbers of concurrent streams (1,16)",
    )
    parser.add_argument("--rounds", type=positive, default=400, help="rounds of each (%(default)s)")
    parser.add_argument(
        "--seconds", type=positive_number, default=0.5, help="time of a measurement (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=256, help="tokens of a response (%(default)s)"
    )
    parser.add_argument("flags", nargs="*", help="options of `nanovllm serve`, after --")
    add_run_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 2:
        parser.error("--rounds is 1, but a standard error needs at least 2")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    print(heading(parsed), flush=True)
    flags = ["--num-threads", str(parsed.threads), "--log-level", "warning", *parsed.flags]
    with ServerProcess([parsed.model, *flags], lease_s=LEASE_S) as server:
        loads = {}
        for streams in parsed.streams:
            loads[str(streams)] = record = measure(server, streams, parsed)
            print(shown(streams, record), flush=True)
    finish({"benchmark": "inspector_cost", "rounds": parsed.rounds, "loads": loads}, parsed)
    return 0


def measure(server: ServerProcess, streams: int, parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the processor times per token, and the mean ratio of all rounds with its error."""
    times: dict[bool, list[float]] = {False: [], True: []}
    frames_per_s: list[float] = []
    num_frames = num_bytes = 0
    generator = random.Random(parsed.seed)
    with steady_load(server.port, streams, parsed.tokens):
        time.sleep(min(1.0, parsed.seconds))  # warm up
        for number in range(parsed.rounds):
            tell(f"{streams} streams: round {number + 1} of {parsed.rounds}")
            for is_watched in generator.sample((False, True), 2):
                watch = watching(server.port) if is_watched else contextlib.nullcontext(Reader())
                with watch as reader:
                    time.sleep(SETTLE_S + MAX_INTERVAL_S * generator.random())
                    before, began_s = reader.frames, time.monotonic()
                    times[is_watched].append(cpu_s_per_token(server, parsed.seconds))
                    if is_watched:
                        frames_per_s.append((reader.frames - before) / (time.monotonic() - began_s))
                num_frames += reader.frames
                num_bytes += reader.num_bytes
    ratios = [watched / alone for watched, alone in zip(times[True], times[False], strict=True)]
    logarithms = [math.log(ratio) for ratio in ratios]
    return {
        "cost": math.expm1(statistics.fmean(logarithms)),
        "standard_error": statistics.stdev(logarithms) / math.sqrt(len(ratios)),
        "ratios": ratios,
        "cpu_s_per_token": statistics.median(times[False]),
        "watched_cpu_s_per_token": statistics.median(times[True]),
        "frames_per_s": statistics.fmean(frames_per_s),
        "frame_bytes": num_bytes / num_frames,
    }


@contextlib.contextmanager
def steady_load(port: int, streams: int, tokens: int) -> Iterator[None]:
    """Keep `streams` streams busy in the context; at its end, raise the first error of one."""
    is_ended = threading.Event()
    errors: list[BaseException] = []

    def stream(number: int) -> None:
        body = {
            "prompt": [number + 1] * 8,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            while not is_ended.is_set():
                fetch(port, "POST", "/v1/completions", body)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_ended.set()
        for thread in threads:
            thread.join()
        if errors:  # it explains an error of the measurement, too
            raise errors[0]


def cpu_s_per_token(server: ServerProcess, seconds: float) -> float:
    """Return the server's processor time per generated token, in the next `seconds`.

    Raises RuntimeError if none is generated.
    """
    before = counters(server)
    time.sleep(seconds)
    after = counters(server)
    tokens = after["tokens"] - before["tokens"]
    if tokens == 0:
        raise RuntimeError(f"no token was generated in {seconds:g} s; set longer --seconds")
    return (after["cpu_s"] - before["cpu_s"]) / tokens


@contextlib.contextmanager
def watching(port: int) -> Iterator[Reader]:
    """Read the stream of events meanwhile."""
    reader = Reader()
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    connection.request("GET", "/v1/engine/events")
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the stream of events was answered with {response.status}")

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            while not reader.is_ended.is_set():
                line = response.readline()
                reader.num_bytes += len(line)
                reader.frames += line.startswith(b"data: ")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield reader
    finally:
        reader.is_ended.set()
        thread.join()  # a next event comes, because there is load
        response.close()
        connection.close()


def counters(server: ServerProcess) -> dict[str, float]:
    """Return the server's processor time and its number of generated tokens."""
    values = dict(
        line.rsplit(" ", 1)
        for line in fetch(server.port, "GET", "/metrics").decode().splitlines()
        if not line.startswith("#")
    )
    (tokens,) = (
        value
        for name, value in values.items()
        if name.startswith("nanovllm:generation_tokens_total")
    )
    cpu_s = precise_cpu_s(server.pid) or float(values["process_cpu_seconds_total"])
    return {"cpu_s": cpu_s, "tokens": float(tokens)}


def precise_cpu_s(pid: int) -> float | None:
    """Return a process's processor time to the nanosecond; None where the system does not say."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    times_ns = [int(file.read_text().split()[0]) for file in files]
    return sum(times_ns) / 1e9 or None


def fetch(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of a response; raises RuntimeError unless its status is 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), _JSON)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(
            f"{method} {path} was answered with {response.status}: {content[:300]!r}"
        )
    return content


def shown(streams: int, record: Mapping[str, Any]) -> str:
    """Format the figures of a load as a line."""
    alone, watched = record["cpu_s_per_token"], record["watched_cpu_s_per_token"]
    cost, error = 100 * record["cost"], 100 * record["standard_error"]
    return (
        f"{streams:3} streams: {1e6 * alone:.1f} us of processor time per token, watched "
        f"{1e6 * watched:.1f} us; cost {cost:+.2f}% +- {error:.2f}% "
        f"({record['frames_per_s']:.1f} events/s of {record['frame_bytes'] / 1000:.1f} kB)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
