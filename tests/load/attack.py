"""The parts of an attack: requests, limits and outcomes.

Each attack ends when its time is over or its rounds are done. Outcomes are counted: the status of a
response, "closed" for a connection without one, "no answer" after the time limit, "left" if the
attacker disconnected, or the attack's own outcomes.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.load.wire import Answer, Connection, parse

CLOSED, LEFT, NO_ANSWER = "closed", "left", "no answer"
REFUSED = frozenset({"400", "413", "422", "429", "503"})
"""Statuses by which a server may refuse what costs too much."""
SERVED = REFUSED | {"200"}
LOADED = SERVED | {NO_ANSWER}
"""Of fair requests that are more than the server can answer in time."""
_KEPT_BYTES = 1 << 16
_PAUSE_S = 0.05  # between two rounds


@dataclass(frozen=True, slots=True)
class Target:
    """A server under attack.

    Attributes:
        deadline_s: when the attack must be over, on the clock of time.monotonic.
        patience_s: how long a request may wait behind other clients' load; 0 without such load.
    """

    port: int
    deadline_s: float
    patience_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Return the remaining seconds of the attack."""
        return max(0.0, self.deadline_s - time.monotonic())


Run = Callable[[Target], Awaitable[Counter[str]]]
Prepare = Callable[[Path], list[str]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        finding: its number in the review that reported it, or empty.
        run: run the attack and count the outcomes.
        allowed: outcomes of a server that withstands it.
        prepare: write files to a folder and return the server's arguments; None for any server.
        is_load: its requests are fair but many: bystanders wait for their turn, and may be refused.
        is_sent_ids: bystanders send token ids, because the model cannot tokenize text.
        max_open_files: the server's limit on open files.
        has_keys: the server has two API keys, so that bystanders are another client than the
            attacker, and what they wait for has the limits of equal shares.
        deadline_s: `x-request-timeout-s` of bystanders.
        signal_after_s: delay of SIGTERM after the start of the attack.
        forbidden_in_log: texts that the server's log must not contain.
        needs_idle_server: its outcome is read from totals of the server, which the load of other
            clients would change.
    """

    name: str
    finding: str
    run: Run
    allowed: frozenset[str] = SERVED
    prepare: Prepare | None = None
    is_load: bool = False
    is_sent_ids: bool = False
    has_keys: bool = False
    max_open_files: int | None = None
    deadline_s: float | None = None
    signal_after_s: float | None = None
    forbidden_in_log: Sequence[str] = field(default=())
    needs_idle_server: bool = False

    @property
    def fits_any_server(self) -> bool:
        """Return whether it can run beside the load of a shared server."""
        special: tuple[Any, ...] = (self.prepare, self.max_open_files, self.signal_after_s)
        needs_own = self.needs_idle_server or self.has_keys
        return all(value is None for value in special) and not needs_own


async def ask(target: Target, request: bytes, *, leave_after_s: float | None = None) -> str:
    """Send one request on its own connection; return the outcome."""
    try:
        async with Connection(target.port) as connection:
            sending = asyncio.ensure_future(_send(connection, request))
            try:
                if leave_after_s is not None:
                    await asyncio.sleep(min(leave_after_s, target.left_s))
                    return LEFT
                answer = await asyncio.wait_for(read_answer(connection), target.left_s)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    except asyncio.TimeoutError:
        return NO_ANSWER
    except OSError:
        return CLOSED
    return CLOSED if answer is None else outcome_of(answer)


def outcome_of(answer: Answer) -> str:
    """Return the status, with a remark if an error is not in the API's format."""
    if answer.status < 400:
        return str(answer.status)
    try:
        is_in_form = json.loads(answer.body)["error"]["code"] == answer.status
    except (ValueError, KeyError, TypeError):
        is_in_form = False
    return str(answer.status) if is_in_form else f"{answer.status} in another form"


async def read_answer(connection: Connection) -> Answer | None:
    """Read to the end of the connection; parse the first part."""
    kept = b""
    try:
        while part := await connection.read():
            if len(kept) < _KEPT_BYTES:
                kept += part
    except ConnectionError:
        pass
    return parse(kept)


def flood(
    requests: Callable[[int], Sequence[bytes] | bytes],
    *,
    rounds: int,
    copies: int = 1,
    leave_after_s: float | None = None,
) -> Run:
    """Return an attack that sends rounds of concurrent requests.

    Args:
        requests: return the requests of a number; each number gives different ones.
        copies: numbers per round.
    """

    async def run(target: Target) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for turn in range(rounds):
            if not target.left_s or outcomes[CLOSED] > 100:
                break
            batch: list[bytes] = []
            for number in range(turn * copies, (turn + 1) * copies):
                made = requests(number)
                batch += [made] if isinstance(made, bytes) else made
            asking = [ask(target, one, leave_after_s=leave_after_s) for one in batch]
            outcomes.update(await asyncio.gather(*asking))
            await asyncio.sleep(min(_PAUSE_S, target.left_s))
        return outcomes

    return run


async def _send(connection: Connection, request: bytes) -> None:
    try:
        await connection.send(request)
    except OSError:  # the answer, or its absence, says what happened
        return
