"""Attack a server, one attack after another, and measure other clients meanwhile.

Run: make attack    or    python -m tests.load.attack_server --only bad-words,chunks

Each attack has a server of its own: `nanovllm serve` with the bundled model and one thread, with a
memory limit that protects the machine. Meanwhile one client streams, one polls /health every 10 ms,
one requests single tokens and one repeats a seeded request. The table has a row for each attack;
the last line is JSON. The exit code is 1 if a row fails.
"""

import argparse
import asyncio
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.options import tell
from benchmarks.server_process import ServerNotStartedError, ServerProcess
from nanovllm.cli.argument_types import names_of, not_negative, positive, positive_number
from nanovllm.cli.bench.report import describe_machine
from nanovllm.config import parse_bytes
from tests.load import payloads
from tests.load.attack import Attack
from tests.load.attacks import ATTACKS
from tests.load.bystanders import LOST, OK, OTHER_BITS, REFUSED, Bystanders
from tests.load.programs import start_program
from tests.load.watch import cpu_s, peak_bytes, tree_bytes

SHUTDOWN_TIMEOUT_S = 3
# A small KV cache, so that what grows is something else.
_FLAGS = ["--shutdown-timeout-s", str(SHUTDOWN_TIMEOUT_S), "--kv-cache-memory", "160MiB"]
_EXIT_LIMIT_S = SHUTDOWN_TIMEOUT_S + 9.0  # its own patience for clients included
_EXIT_TIMEOUT_S = 30.0
_WARM_UP_S = 1.0
_REFUSED_AT_START = "refused at start"
_COLUMNS = (
    ("attack", "name", "<24"),
    ("stream", "stream_ms", ">9"),
    ("health", "health_ms", ">9"),
    ("1 token", "completion_ms", ">9"),
    ("own", "own_delay_ms", ">7"),
    ("before", "before_mib", ">7"),
    ("peak", "peak_mib", ">7"),
    ("after", "after_mib", ">7"),
    ("log MB", "log_mb", ">7"),
    ("alive", "alive", ">6"),
    ("exit", "exit_code", ">6"),
    ("in s", "exit_s", ">6"),
)
"""Heading, figure and width of each column; times in milliseconds, memory in MiB."""


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        type=names_of(tuple(ATTACKS)),
        default=list(ATTACKS),
        metavar="NAMES",
        help=f"attacks, with commas between (all of {', '.join(ATTACKS)})",
    )
    parser.add_argument(
        "--seconds-per-attack",
        type=positive_number,
        default=15.0,
        help="longest time of one attack (%(default)s)",
    )
    parser.add_argument(
        "--settle-s",
        type=positive_number,
        default=3.0,
        help="how long bystanders go on after it (%(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        default="4GiB",
        help="RLIMIT_DATA of the server and of each process it starts; 0 for none (%(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="of the server (%(default)s)")
    limits = (
        ("--max-pause-ms", 100.0, "longest pause of the stream and longest wait for one token"),
        (
            "--max-load-pause-ms",
            1000.0,
            "longest pause of the stream beside fair, but many requests",
        ),
        ("--max-fair-pause-ms", 500.0, "the same with equal shares, beside another client's"),
        ("--max-fair-start-ms", 2000.0, "longest wait for the stream's first token beside them"),
        ("--max-health-ms", 100.0, "longest wait for /health"),
        ("--max-growth-mib", 1024.0, "growth of memory during an attack"),
        ("--max-left-mib", 256.0, "growth of memory that stays after an attack"),
        ("--max-log-mb", 2.0, "what the server may log during an attack"),
    )
    for name, default, text in limits:
        parser.add_argument(
            name, type=positive_number, default=default, help=f"{text} (%(default)s)"
        )
    parser.add_argument(
        "--repeat", type=not_negative, default=0, help="repetitions of all attacks (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="also write the JSON to this file"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and judge the attacks; return 1 if one fails."""
    parsed = parse_flags(arguments)
    machine = describe_machine()
    print(f"machine  {machine['cpu']}, {machine['cores']} cores, {machine['os']}\n", flush=True)
    print("".join(f"{head:{width}}" for head, _, width in _COLUMNS), flush=True)
    rows: list[dict[str, Any]] = []
    idle: Mapping[str, Any] = {}
    for name in parsed.only * (1 + parsed.repeat):
        row = attack_one(ATTACKS[name], parsed)
        row["faults"] = faults(row, ATTACKS[name], parsed, idle)
        if name == "none":
            idle = row
        rows.append(row)
        print(shown(row), flush=True)
    failed = [row["name"] for row in rows if row["faults"]]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} hold", flush=True)
    record = {
        "benchmark": "attacks",
        "seconds_per_attack": parsed.seconds_per_attack,
        "memory_limit": parsed.memory_limit,
        "held": not failed,
        "failed": failed,
        "rows": rows,
        "machine": machine,
    }
    line = json.dumps(record, allow_nan=False)
    if parsed.output is not None:
        parsed.output.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return int(bool(failed))


def attack_one(attack: Attack, parsed: argparse.Namespace) -> dict[str, Any]:
    """Start a server, attack it and stop it; return the figures of a row."""
    with tempfile.TemporaryDirectory() as folder:
        extra = attack.prepare(Path(folder)) if attack.prepare is not None else []
        keys = (payloads.ATTACKER_KEY, payloads.BYSTANDER_KEY) if attack.has_keys else ()
        extra += [f"--api-key={key}" for key in keys]
        flags = [*extra, *_FLAGS, "--num-threads", str(parsed.threads)]
        limits = {}
        if parsed.memory_limit != "0":
            limits["RLIMIT_DATA"] = parse_bytes(parsed.memory_limit)
        if attack.max_open_files is not None:
            limits["RLIMIT_NOFILE"] = attack.max_open_files
        try:
            with ServerProcess(flags, limits) as server:
                return {"name": attack.name, **asyncio.run(_attack(attack, server, parsed))}
        except ServerNotStartedError as error:
            tell(f"{attack.name}: {str(error).strip()[-300:]}")
            return {"name": attack.name, "outcomes": {_REFUSED_AT_START: 1}}


async def _attack(
    attack: Attack, server: ServerProcess, parsed: argparse.Namespace
) -> dict[str, Any]:
    key = payloads.BYSTANDER_KEY if attack.has_keys else None
    bystanders = Bystanders(server.port, server.pid, attack.is_sent_ids, attack.deadline_s, key)
    await bystanders.start()
    await asyncio.sleep(_WARM_UP_S)
    before_bytes, log_bytes, cpu_before_s = (
        tree_bytes(server.pid),
        server.log_bytes,
        cpu_s(server.pid),
    )
    seconds = str(parsed.seconds_per_attack)
    at = ["--port", str(server.port), "--seconds", seconds, "--only", attack.name]
    attacker = await start_program("attacks", *at)
    started_s, signalled_s = time.monotonic(), None
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(attacker.wait(), attack.signal_after_s or _longest_s(parsed))
    if attack.signal_after_s is not None:
        await bystanders.stop()
        signalled_s = time.monotonic()
        server.stop()
    outcomes = await _outcomes(attacker, _longest_s(parsed))
    row: dict[str, Any] = {
        "outcomes": outcomes,
        "seconds": round(time.monotonic() - started_s, 1),
        "log_mb": round((server.log_bytes - log_bytes) / 1e6, 1),
    }
    if signalled_s is None:
        await asyncio.sleep(parsed.settle_s)
        await bystanders.stop()
    used_s = cpu_s(server.pid)
    row |= {
        **bystanders.figures(),
        "server_cpu_s": None if used_s is None or cpu_before_s is None else used_s - cpu_before_s,
        "before_mib": _mib(before_bytes),
        "peak_mib": _mib(max(bystanders.peak_bytes, peak_bytes(server.pid) or 0)),
        "after_mib": _mib(tree_bytes(server.pid)),
        "alive": "-"
        if signalled_s is not None
        else "no"
        if server.exit_code is not None
        else "yes",
        "log_is_clean": not any(server.is_logged(text) for text in attack.forbidden_in_log),
    }
    return {**row, **await _end(server, signalled_s)}


async def _end(server: ServerProcess, signalled_s: float | None) -> dict[str, Any]:
    """Stop the server, unless it was signalled, and return how it exited."""
    died = signalled_s is None and server.exit_code is not None
    if signalled_s is None:
        signalled_s = time.monotonic()
        server.stop()
    end = await server.end(max(1.0, _EXIT_TIMEOUT_S - (time.monotonic() - signalled_s)))
    return {
        "exit_code": end["exit_code"],
        "exit_s": None if died else round(time.monotonic() - signalled_s, 1),
        "tracebacks": end["tracebacks"],
        "integrity": end["integrity"],
    }


async def _outcomes(attacker: asyncio.subprocess.Process, timeout_s: float) -> dict[str, int]:
    """Return the attacker's outcomes at its end."""
    try:
        output, _ = await asyncio.wait_for(attacker.communicate(), timeout_s)
        found: dict[str, dict[str, int]] = json.loads(output.splitlines()[-1])
    except (asyncio.TimeoutError, ValueError, IndexError):
        with contextlib.suppress(ProcessLookupError):
            attacker.kill()
        return {"the attacker came to no end": 1}
    return next(iter(found.values()))


def faults(
    row: dict[str, Any],
    attack: Attack,
    parsed: argparse.Namespace,
    idle: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Return the violated conditions of a row.

    Beside many fair requests, pauses within a stream count and time to first token does not. Waits
    may exceed their limits by `own_delay_ms`, in which this process had no processor, and by the
    waits of `idle`, the row without an attack. Integrity is checked only if the engine was idle
    when it stopped.
    """
    if _REFUSED_AT_START in row["outcomes"]:
        return [] if attack.prepare is not None else ["the server did not start"]
    fates = row["bystanders"]
    stream = ("gap_ms", "max_load_pause_ms") if attack.is_load else ("stream_ms", "max_pause_ms")
    if attack.has_keys:
        stream = ("gap_ms", "max_fair_pause_ms")
    pauses = [stream, ("health_ms", "max_health_ms")]
    is_fair = attack.deadline_s is None and not attack.is_load
    if is_fair:
        pauses.append(("completion_ms", "max_pause_ms"))
    if attack.has_keys:
        pauses += [("stream_ms", "max_fair_start_ms"), ("completion_ms", "max_fair_start_ms")]
    growth = (("peak_mib", "max_growth_mib"), ("after_mib", "max_left_mib"))
    own_ms = row["own_delay_ms"]
    waits = [
        (f"{name} over {limit:g}", row[name] <= limit + own_ms + idle.get(name, 0.0))
        for name, limit in ((name, getattr(parsed, limit)) for name, limit in pauses)
    ]
    grown = [(f"{name} grew", _grew(row, name) <= getattr(parsed, limit)) for name, limit in growth]
    deadline_ms = math.inf if attack.deadline_s is None else 1000 * attack.deadline_s
    was_stopped_at_work = row["exit_s"] is None or row["exit_s"] >= SHUTDOWN_TIMEOUT_S
    checks = [
        *waits,
        *grown,
        ("deadline missed", row["completion_ms"] <= deadline_ms + parsed.max_pause_ms + own_ms),
        ("outcomes", set(row["outcomes"]) <= attack.allowed),
        ("the server died", row["alive"] != "no"),
        ("answers lost", not fates.get(LOST)),
        ("other bits", not fates.get(OTHER_BITS)),
        ("bystanders got errors", set(fates) <= {OK, REFUSED, LOST, OTHER_BITS}),
        ("bystanders were refused", not is_fair or not fates.get(REFUSED)),
        ("log grew", row["log_mb"] <= parsed.max_log_mb),
        ("log forged", row["log_is_clean"]),
        ("exit code", row["exit_code"] == 0),
        ("slow exit", row["exit_s"] is not None and row["exit_s"] <= _EXIT_LIMIT_S),
        ("integrity", row["integrity"] == "clean" or was_stopped_at_work),
    ]
    return [name for name, held in checks if not held]


def shown(row: dict[str, Any]) -> str:
    """Format a row, with outcomes and faults below it."""
    cells = [row.get(name) for _, name, _ in _COLUMNS]
    line = "".join(
        f"{'-' if cell is None else cell if isinstance(cell, str) else f'{cell:g}':{width}}"
        for cell, (_, _, width) in zip(cells, _COLUMNS, strict=True)
    )
    outcomes = ", ".join(f"{number:,} {outcome}" for outcome, number in row["outcomes"].items())
    fates = ", ".join(
        f"{number:,} {fate}" for fate, number in row.get("bystanders", {}).items() if number
    )
    verdict = f"FAIL: {', '.join(row['faults'])}" if row["faults"] else "ok"
    return (
        f"{line}\n    attacker: {outcomes or 'nothing'}; bystanders: {fates or 'none'}; {verdict}"
    )


def _grew(row: dict[str, Any], name: str) -> float:
    """Return the growth of memory in MiB; 0 if it is unknown."""
    if row[name] is None or row["before_mib"] is None:
        return 0.0
    return float(row[name] - row["before_mib"])


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 2**20)


def _longest_s(parsed: argparse.Namespace) -> float:
    """Return an attacker's time limit, with its start and end."""
    return float(parsed.seconds_per_attack) + 10.0


if __name__ == "__main__":
    sys.exit(main())
