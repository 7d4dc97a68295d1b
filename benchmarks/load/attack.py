"""What an attack is made of: who sends it, how it is bounded, and what became of its requests.

Each attack ends by itself when its time is over or its rounds are done. What it learns is counted
by outcome: the status of an answer, "closed" where the connection ended without one, "no answer"
where time was over first, "left" where the attacker went away, or a word of the attack's own.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load.wire import Answer, Connection, parse

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
        """Seconds until the attack must be over."""
        return max(0.0, self.deadline_s - time.monotonic())


Run = Callable[[Target], Awaitable[Counter[str]]]
Prepare = Callable[[Path], list[str]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        finding: its number in the report that it comes from; empty where it has none.
        run: performs it and counts the outcomes.
        allowed: outcomes that a server which holds may give.
        prepare: makes files in a folder and returns the server's further arguments; None where
            any server can be attacked.
        is_load: its requests are fair ones, only many: bystanders wait for their turn, and may be
            refused.
        is_sent_ids: bystanders send token ids, because the model cannot read text.
        max_open_files: the server's limit of open files.
        deadline_s: what bystanders ask for in `x-request-timeout-s`.
        signal_after_s: SIGTERM is sent so many seconds after the attack began.
        forbidden_in_log: what the server's log must not contain.
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
    max_open_files: int | None = None
    deadline_s: float | None = None
    signal_after_s: float | None = None
    forbidden_in_log: Sequence[str] = field(default=())
    needs_idle_server: bool = False

    @property
    def fits_any_server(self) -> bool:
        """Whether it can be mixed into the load of a server that is also used for other things."""
        special: tuple[Any, ...] = (self.prepare, self.max_open_files, self.signal_after_s)
        return all(value is None for value in special) and not self.needs_idle_server


async def ask(target: Target, request: bytes, *, leave_after_s: float | None = None) -> str:
    """Send one request on a connection of its own; returns the outcome."""
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
    """The status, and a remark where an error is not in the API's one form."""
    if answer.status < 400:
        return str(answer.status)
    try:
        is_in_form = json.loads(answer.body)["error"]["code"] == answer.status
    except (ValueError, KeyError, TypeError):
        is_in_form = False
    return str(answer.status) if is_in_form else f"{answer.status} in another form"


async def read_answer(connection: Connection) -> Answer | None:
    """Read to the end of the connection, however much there is; returns the first part's answer."""
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
    """Return an attack that sends requests at once, round after round.

    Args:
        requests: what is sent for a number, which is another one each time.
        copies: numbers of each round.
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
