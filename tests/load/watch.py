"""Monitor a server under load: /health latency, /metrics, memory and open files."""

import asyncio
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.worker import resident_bytes
from tests.load.ledger import must_be_whole
from tests.load.wire import Connection, get, parse

HEALTH_INTERVAL_S = 0.1
SAMPLE_INTERVAL_S = 1.0
_TIMEOUT_S = 60.0
_GAUGES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "kv_usage": "kv_cache_usage_perc",
}
_DRAFTS = {
    "drafted_tokens": "spec_decode_num_draft_tokens_total",
    "accepted_tokens": "spec_decode_num_accepted_tokens_total",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample; `at_s` is the time since the start of the load."""

    at_s: float
    rss_bytes: int | None
    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    computed_tokens: float
    drafted_tokens: float = 0.0
    accepted_tokens: float = 0.0


@dataclass(slots=True)
class Watch:
    """Samples, and the latencies of /health."""

    port: int
    pid: int
    samples: list[Sample] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    async def ask_health(self) -> None:
        """Poll /health until cancelled."""
        while True:
            asked_s = time.monotonic()
            answer = parse(await fetch(self.port, "/health"))
            if must_be_whole(answer).status != 200:
                raise RuntimeError(f"the server is not well: {answer}")
            self.health_s.append(time.monotonic() - asked_s)
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def take_samples(self) -> None:
        """Sample until cancelled."""
        while True:
            self.samples.append(await self.sample())
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def sample(self) -> Sample:
        """Take a sample."""
        page = must_be_whole(parse(await fetch(self.port, "/metrics"))).body.decode()
        metrics = _GAUGES | (_DRAFTS if "spec_decode" in page else {})
        values = {name: gauge(page, metric) for name, metric in metrics.items()}
        computed = gauge(page, "prompt_tokens_computed_total") + gauge(
            page, "generation_tokens_total"
        )
        preemptions = gauge(page, "num_preemptions_total")
        return Sample(
            time.monotonic() - self.started_s,
            resident_bytes(self.pid),
            **values,
            preemptions=preemptions,
            computed_tokens=computed,
        )

    async def wait_until_idle(self, timeout_s: float) -> Sample:
        """Return the first idle sample, or the last one after a timeout."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            last = await self.sample()
            if not (last.running or last.waiting or last.kv_usage) or time.monotonic() > deadline_s:
                return last
            await asyncio.sleep(0.05)


async def fetch(port: int, path: str) -> bytes:
    """Return the response to a GET."""
    async with Connection(port) as connection:
        await connection.send(get(path))
        return await asyncio.wait_for(connection.read_all(), _TIMEOUT_S)


def gauge(page: str, name: str) -> float:
    """Return the value of a metric."""
    match = re.search(rf"^nanovllm:{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/metrics has no {name}")
    return float(match[1])


def open_files(pid: int) -> int | None:
    """Return the number of open files of a process; None if unknown."""
    folder = Path(f"/proc/{pid}/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def tree_bytes(pid: int) -> int | None:
    """Return resident memory of a process and its descendants; None if unknown.

    Shared pages count once per process.
    """
    sizes = []
    for one in process_tree(pid):
        with suppress(OSError):  # one that has ended
            sizes.append(resident_bytes(one) or 0)
    return sum(sizes) or None


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants, as far as known."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has ended
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    tree = [pid]
    for one in tree:
        tree += children.get(one, [])
    return tree


def peak_bytes(pid: int) -> int | None:
    """Return the peak resident memory of a process; None if unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def cpu_s(pid: int) -> float | None:
    """Return the processor time of a process; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    user, system = fields.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
