"""Run a server under several times its capacity, with good and misbehaving clients.

Run: make soak    or    python -m tests.load.server_soak --minutes 10

Clients read slowly, disconnect, stall, drip bytes and send malformed data. With --attacks, an
attacker runs beside them: the attacks of attacks.py that fit any server, in turns, and
bystanders that measure their effect.

With --speculative-config, the server drafts tokens under load, and its responses are compared with
those without drafts.

It starts `nanovllm serve` with a short queue in its own process and drives it over sockets. The
verdict has a line for each condition; the last line is JSON. The exit code is 1 if a condition
fails. docs/reference/guarantees.md lists the promises.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import tell
from benchmarks.server_process import ServerProcess
from nanovllm.cli.argument_types import names_of, not_negative, positive, positive_number
from nanovllm.cli.bench.report import describe_machine
from nanovllm.config import parse_bytes
from tests.load.attacks import FOR_ANY_SERVER
from tests.load.clients import PATIENCE_S, Client, Load, ask_once
from tests.load.ledger import ANSWERED, FAILED, Ledger, must_be_whole
from tests.load.programs import start_program
from tests.load.requests import COMPLETIONS, MAX_BODY_BYTES, Ask, known_asks
from tests.load.verdict import Seen, judge, table
from tests.load.watch import Watch, open_files
from tests.load.wire import Connection, parse, post

MAX_QUEUED, MAX_SEQS, STALLED_CLIENT_S = 64, 16, 4
ATTACKED_BODY_BYTES = 4 << 20
FLAGS = [
    "--max-queued-requests", str(MAX_QUEUED), "--max-num-seqs", str(MAX_SEQS),
    "--scheduling-policy", "priority", "--stalled-client-s", str(STALLED_CLIENT_S),
    "--log-level", "warning", "--shutdown-timeout-s", "45",  # for the last streams
]  # fmt: skip
"""Of the server: fewer places than there are clients."""

_SPECIAL = {"slow": 0.05, "stalled": 0.03, "dripping": 0.05}  # shares of the clients
_DRAIN_S = 90.0
_LAST_STREAMS = 4


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or name of a model (the bundled one)")
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=10.0,
        help="how long the load lasts (%(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=positive,
        default=160,
        help=f"clients at once; the server has {MAX_QUEUED} places (%(default)s)",
    )
    parser.add_argument(
        "--kv-cache-memory",
        default="32MiB",
        metavar="MEMORY",
        help="the server's cache; a smaller one preempts (%(default)s)",
    )
    parser.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="speculative decoding of the server, which then must draft tokens (none)",
    )
    parser.add_argument(
        "--seed", type=not_negative, default=7, help="draws what the clients do (%(default)s)"
    )
    parser.add_argument(
        "--max-health-s",
        type=positive_number,
        default=2.0,
        help="longest that /health may take (%(default)s)",
    )
    parser.add_argument(
        "--num-threads", type=positive, help="threads of the server (its own choice)"
    )
    parser.add_argument(
        "--attacks",
        type=names_of(FOR_ANY_SERVER),
        default=[],
        metavar="NAMES",
        help="attacks to mix in, with commas between, or all (none)",
    )
    parser.add_argument(
        "--max-pause-s",
        type=positive_number,
        default=2.0,
        help="longest pause of a stream beside attacks (%(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        default="8GiB",
        help="RLIMIT_DATA of an attacked server and of each of its processes (%(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and judge; return 1 if a condition fails."""
    parsed = parse_flags(arguments)
    machine = describe_machine()
    print(f"machine  {machine['cpu']}, {machine['cores']} cores, {machine['os']}\n", flush=True)
    body_bytes = ATTACKED_BODY_BYTES if parsed.attacks else MAX_BODY_BYTES
    flags = [*FLAGS, "--kv-cache-memory", parsed.kv_cache_memory]
    flags += ["--max-body-bytes", str(body_bytes)]
    flags += ["--num-threads", str(parsed.num_threads)] if parsed.num_threads else []
    if parsed.speculative_config is not None:
        flags += ["--speculative-config", parsed.speculative_config]
    limits = {"RLIMIT_DATA": parse_bytes(parsed.memory_limit)} if parsed.attacks else {}
    with ServerProcess([*([parsed.model] if parsed.model else []), *flags], limits) as server:
        verdict = asyncio.run(soak(server, parsed))
    print(table(verdict), flush=True)
    about = {
        "benchmark": "server_soak",
        "minutes": parsed.minutes,
        "clients": parsed.clients,
        "seed": parsed.seed,
        "attacked_by": parsed.attacks,
        "server": flags,
        "machine": machine,
    }
    line = json.dumps({**about, **verdict}, allow_nan=False)
    if parsed.json is not None:
        parsed.json.write_text(line + "\n", encoding="utf-8")
    print(f"\n{line}", flush=True)
    return int(not verdict["held"])


async def soak(server: ServerProcess, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run known requests alone, the load, the drain and the signal; return the verdict."""
    ledger = Ledger()
    tell("Asking alone what will be asked under load")
    known = [
        (ask, await ask_once(server.port, ask.without_drafts()))
        for ask in known_asks(random.Random(parsed.seed), 3)
    ]
    files_before = open_files(server.pid)
    watch = Watch(server.port, server.pid)
    body_bytes = ATTACKED_BODY_BYTES if parsed.attacks else MAX_BODY_BYTES
    load = Load(server.port, known, ledger, STALLED_CLIENT_S, body_bytes)
    async with _attacked(server, parsed) as seen:
        await _run_load(load, watch, parsed)
    idle = await watch.wait_until_idle(_DRAIN_S)
    files_after = open_files(server.pid)
    refilled = await _fills_the_queue(server.port)
    last_streams = await _end_while_streaming(server)
    end = {**await server.end(), "last_streams": last_streams}
    if end["exit_code"] or end["tracebacks"]:
        tell(end["log"])
    return judge(
        ledger,
        watch,
        idle,
        (files_before, files_after),
        refilled,
        end,
        parsed.max_health_s,
        seen[0] if seen else None,
        must_draft=parsed.speculative_config is not None,
    )


@contextlib.asynccontextmanager
async def _attacked(server: ServerProcess, parsed: argparse.Namespace) -> AsyncIterator[list[Seen]]:
    """Attack the server meanwhile; on exit, the list has the results."""
    found: list[Seen] = []
    if not parsed.attacks:
        yield found
        return
    seconds = 60 * parsed.minutes
    at = ["--port", str(server.port)]
    names = ["--seconds", str(seconds), "--only", ",".join(parsed.attacks)]
    names += ["--patience-s", str(PATIENCE_S)]
    bystanders = await start_program("bystanders", *at, "--pid", str(server.pid))
    attacker = await start_program("attacks", *at, *names)
    try:
        yield found
        outcomes = await _last_line(attacker, _DRAIN_S + PATIENCE_S)
        figures = await _last_line(bystanders, _DRAIN_S)
    finally:
        for process in (attacker, bystanders):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    found.append(Seen(outcomes, figures, parsed.max_health_s, parsed.max_pause_s))


async def _last_line(process: asyncio.subprocess.Process, timeout_s: float) -> dict[str, Any]:
    """Close a program's input and read the JSON at its end."""
    output, _ = await asyncio.wait_for(process.communicate(b""), timeout_s)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


async def _run_load(load: Load, watch: Watch, parsed: argparse.Namespace) -> None:
    """Run all clients for the given time, then let each finish its request."""
    ways = Counter({way: max(1, round(share * parsed.clients)) for way, share in _SPECIAL.items()})
    ways["any"] = max(1, parsed.clients - ways.total())
    clients = [
        Client(load, way, parsed.seed * 100_003 + number)
        for number, way in enumerate(ways.elements())
    ]
    tell(
        f"{parsed.minutes:g} minutes of {len(clients)} clients: "
        + ", ".join(f"{number} {way}" for way, number in ways.items())
    )
    running = [asyncio.ensure_future(client.run()) for client in clients]
    watching = [
        asyncio.ensure_future(watch.ask_health()),
        asyncio.ensure_future(watch.take_samples()),
        asyncio.ensure_future(_tell_now_and_then(load, watch)),
    ]
    await asyncio.wait(
        [*running, *watching], timeout=60 * parsed.minutes, return_when=asyncio.FIRST_COMPLETED
    )  # the first where something is wrong
    load.is_over.set()
    while pending := [task for task in watching if not task.done()]:
        for task in pending:  # again and again: wait_for can lose a cancellation before Python 3.12
            task.cancel()
        await asyncio.wait(pending, timeout=1)
    for outcome in await asyncio.gather(*watching, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    done, late = await asyncio.wait(running, timeout=_DRAIN_S)
    for task in late:
        task.cancel()
    for outcome in await asyncio.gather(*done):
        assert outcome is None


async def _tell_now_and_then(load: Load, watch: Watch) -> None:
    started_s = time.monotonic()
    while True:
        await asyncio.sleep(30)
        sample, ledger = watch.samples[-1], load.ledger
        rss = "-" if sample.rss_bytes is None else f"{sample.rss_bytes / 2**20:.1f} MiB"
        fates = (
            f"{ledger.count(ANSWERED):,} answered, {ledger.count('refused'):,} refused, "
            f"{ledger.count(FAILED)} failed"
        )
        tell(f"{time.monotonic() - started_s:6.0f} s  {ledger.total:8,} requests, {fates}; {rss}")


async def _fills_the_queue(port: int) -> bool:
    """Return whether one request gets the whole queue, so that no slot leaked."""
    async with Connection(port) as connection:
        await connection.send(
            post(COMPLETIONS, {"prompt": "Once", "n": MAX_QUEUED, "max_tokens": 2})
        )
        return must_be_whole(parse(await connection.read_all())).status == 200


async def _end_while_streaming(server: ServerProcess) -> tuple[int, int]:
    """Send SIGTERM during streams; return how many ended properly, and all."""
    ask = Ask(
        "last",
        COMPLETIONS,
        {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True},
    )
    ended = 0
    async with contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(Connection(server.port)) for _ in range(_LAST_STREAMS)
        ]
        for connection in connections:
            await connection.send(post(ask.path, ask.body))
        begun = [await connection.read() for connection in connections]
        server.stop()
        for first, connection in zip(begun, connections, strict=True):
            answer = parse(first + await connection.read_all())
            ended += (
                answer is not None and answer.is_whole and answer.body.endswith(b"data: [DONE]\n\n")
            )
    return ended, _LAST_STREAMS


if __name__ == "__main__":
    sys.exit(main())
