"""Attacks that are a dialogue: they react to what the server does, unlike a flood of requests."""

import asyncio
import json
from collections import Counter

from tests.load import payloads
from tests.load.attack import CLOSED, Target, ask, read_answer
from tests.load.requests import COMPLETIONS
from tests.load.watch import fetch, gauge
from tests.load.wire import Connection, parse, post, read_for

_IDLE_CONNECTIONS = 120


async def rest(target: Target) -> Counter[str]:
    """Do nothing: the baseline of this machine."""
    await asyncio.sleep(target.left_s)
    return Counter()


async def send_chunks(target: Target) -> Counter[str]:
    """Send endless bodies of one-byte chunks on three connections."""

    async def one(outcomes: Counter[str]) -> None:
        block = payloads.chunks_without_end()
        while target.left_s:
            try:
                async with Connection(target.port) as connection:
                    await connection.send(payloads.open_chunked_body())
                    while target.left_s:
                        await asyncio.wait_for(connection.send(block), target.left_s + 0.01)
            except asyncio.TimeoutError:
                return
            except OSError:
                outcomes[CLOSED] += 1
                await asyncio.sleep(min(0.05, target.left_s))

    outcomes: Counter[str] = Counter()
    await asyncio.gather(*(one(outcomes) for _ in range(3)))
    return outcomes


async def hold_connections(target: Target) -> Counter[str]:
    """Open more connections than the server's open files, and send nothing."""
    outcomes: Counter[str] = Counter()
    held: list[Connection] = []
    try:
        for _ in range(_IDLE_CONNECTIONS):
            connection = Connection(target.port)
            try:
                await asyncio.wait_for(connection.__aenter__(), 1.0)
            except (OSError, asyncio.TimeoutError):
                outcomes["not connected"] += 1
                continue
            held.append(connection)
        outcomes["connected"] = len(held)
        await asyncio.sleep(target.left_s)
    finally:
        for connection in held:
            await connection.__aexit__()
    return outcomes


async def forge_special_tokens(target: Target) -> Counter[str]:
    """Write a special token in chats; outcome "forged" if it became one token."""
    outcomes: Counter[str] = Counter()
    for way, request in payloads.forged_chats():
        async with Connection(target.port) as connection:
            await connection.send(request)
            answer = await asyncio.wait_for(read_answer(connection), target.left_s)
        if answer is None or answer.status != 200:
            outcomes[CLOSED if answer is None else f"{answer.status} {way}"] += 1
            continue
        tokens = json.loads(answer.body)["usage"]["prompt_tokens"]
        outcomes["text" if tokens > 2 else f"forged {way}"] += 1
    return outcomes


async def send_two_lengths(target: Target) -> Counter[str]:
    """Send both framings; a second response is a smuggled request."""
    async with Connection(target.port) as connection:
        await connection.send(payloads.two_lengths())
        received = await read_for(connection, min(2.0, target.left_s))
    return Counter({"smuggled" if received.count(b"HTTP/1.1 ") > 1 else "one answer": 1})


async def half_close(target: Target) -> Counter[str]:
    """Close the connection for sending after a request and wait for its answer.

    Beside a load the request waits in the server's queue like any other, so one is sent in a turn
    and may take `patience_s`.
    """
    outcomes: Counter[str] = Counter()
    for number in range(1 if target.patience_s else 5):
        async with Connection(target.port) as connection:
            await connection.send(payloads.completion(seed=number))
            connection.end_sending()
            timeout_s = target.patience_s or min(5.0, target.left_s)
            answer = parse(await read_for(connection, timeout_s))
        outcomes["unanswered" if answer is None else str(answer.status)] += 1
    return outcomes


async def leave_behind_a_byte(target: Target) -> Counter[str]:
    """Send a large request and one byte more, then leave: the request must be aborted.

    The gauges of running and waiting requests tell. They count other clients' requests too, and a
    short queue refuses the 100 choices: so this needs a server of its own.
    """
    body = {"prompt": "a", "n": 100, "max_tokens": 500, "ignore_eos": True}
    async with Connection(target.port) as connection:
        request = post(COMPLETIONS, body, connection="keep-alive")
        await connection.send(request)
        await asyncio.sleep(0.3)
        await connection.send(b"G")
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.3)
    answer = parse(await fetch(target.port, "/metrics"))
    page = "" if answer is None else answer.body.decode()
    left = sum(gauge(page, f"num_requests_{state}") for state in ("running", "waiting"))
    return Counter({"goes on" if left > 50 else "stopped": 1})


async def compile_and_leave(target: Target) -> Counter[str]:
    """Request several costly schemas at once and disconnect."""
    requests = [payloads.multiple_of(999983, number) for number in range(8)]
    leaving = [ask(target, request, leave_after_s=1.0) for request in requests]
    return Counter(await asyncio.gather(*leaving))
