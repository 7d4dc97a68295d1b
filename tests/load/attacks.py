"""The attacks by name. As a program, run those that fit any server against a running one.

Run: python -m tests.load.attacks --port 8000 --seconds 60 --only bad-words,chunks

The attacker has its own process, so that it does not disturb measurements. The last line of output
is JSON: outcomes by attack.
"""

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from nanovllm.cli.argument_types import positive, positive_number
from nanovllm.hub import resolve_model
from tests.load import payloads
from tests.load.attack import (
    CLOSED,
    LEFT,
    LOADED,
    NO_ANSWER,
    REFUSED,
    SERVED,
    Attack,
    Prepare,
    Target,
    flood,
)
from tests.load.dialogues import (
    compile_and_leave,
    forge_special_tokens,
    half_close,
    hold_connections,
    leave_behind_a_byte,
    rest,
    send_chunks,
    send_two_lengths,
)

BEGUN = "attacking"
"""The first line of output: from here on time counts."""
_TURN_S = 5.0  # of one attack, where several take turns
_OPEN_FILES = 64


def _with_template(source: str) -> Prepare:
    """Copy the bundled model with another chat template."""

    def prepare(folder: Path) -> list[str]:
        model = _copy_model(folder)
        (model / "chat_template.jinja").write_text(source, encoding="utf-8")
        return [str(model)]

    return prepare


def _with_tokenizer(change: Callable[[str], str]) -> Prepare:
    """Copy the bundled model with another tokenizer."""

    def prepare(folder: Path) -> list[str]:
        model = _copy_model(folder)
        path = model / "tokenizer.json"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        return [str(model)]

    return prepare


def _template_option(folder: Path) -> list[str]:
    path = folder / "template.jinja"
    path.write_text(payloads.SPECIAL_TOKEN_TEMPLATE, encoding="utf-8")
    return ["--chat-template", str(path)]


def _copy_model(folder: Path) -> Path:
    return shutil.copytree(resolve_model("tiny-books"), folder / "model")


def _ambiguous(n: int) -> Callable[[int], bytes]:
    return lambda number: payloads.ambiguous_grammar(number, n=n)


def _multiples(divisor: int) -> Callable[[int], bytes]:
    return lambda number: payloads.multiple_of(divisor, number)


_WRONG = frozenset({"400", "429"})
_LATE = REFUSED | {NO_ANSWER}
"""Of requests that wait behind other grammars of their client when the attack ends."""
_SIGNAL_AFTER_S = 3.0
_ENDED = REFUSED | {LEFT}  # a server that stops says so

_ALL = [
    Attack("none", "", rest),
    Attack("chained-rules", "1", flood(payloads.chained_rules, rounds=20), REFUSED),
    Attack("chained-terminals", "1", flood(payloads.chained_terminals, rounds=20), REFUSED),
    Attack("multiple-of", "2", flood(_multiples(9999991), rounds=20), _LATE),
    Attack("product-of-multiples", "2", flood(payloads.product_of_multiples, rounds=20), _LATE),
    Attack("eight-multiples", "2", flood(_multiples(999983), copies=8, rounds=3), LOADED),
    Attack("ambiguous-grammar", "3", flood(_ambiguous(1), rounds=10), LOADED),
    Attack("ambiguous-grammar-n8", "3", flood(_ambiguous(8), rounds=10), LOADED),
    Attack(
        "ambiguous-grammar-left",
        "3",
        flood(_ambiguous(8), rounds=10, leave_after_s=0.5),
        frozenset({LEFT}),
    ),
    Attack(
        "sigterm-compiling",
        "4",
        flood(_multiples(9999991), rounds=1),
        _ENDED,
        signal_after_s=_SIGNAL_AFTER_S,
    ),
    Attack("sigterm-left", "4", compile_and_leave, _ENDED, signal_after_s=_SIGNAL_AFTER_S),
    Attack(
        "sigterm-masks",
        "4",
        flood(_ambiguous(8), rounds=1, leave_after_s=1.0),
        _ENDED,
        signal_after_s=_SIGNAL_AFTER_S,
    ),
    Attack(
        "sigterm-bodies",
        "4",
        flood(payloads.many_token_ids, copies=24, rounds=1),
        _ENDED | {"200", CLOSED},
        is_load=True,
        signal_after_s=_SIGNAL_AFTER_S,
    ),
    Attack("deadlines", "4", flood(_multiples(999983), copies=8, rounds=3), LOADED, deadline_s=3.0),
    Attack("bad-words", "5", flood(payloads.bad_words, copies=12, rounds=5), REFUSED),
    Attack(
        "ninety-bodies",
        "5",
        flood(payloads.long_bad_words, copies=90, rounds=3),
        LOADED | {CLOSED},
        is_load=True,
        needs_idle_server=True,
    ),
    Attack("truncated-prompts", "5", flood(payloads.truncated_prompts, copies=12, rounds=5)),
    Attack(
        "log-probabilities", "6", flood(payloads.log_probabilities, rounds=5), LOADED, is_load=True
    ),
    Attack(
        "many-token-ids",
        "6",
        flood(payloads.many_token_ids, rounds=5),
        LOADED,
        is_load=True,
        needs_idle_server=True,
    ),
    Attack(
        "inspector-queue",
        "",
        flood(payloads.neighbors, copies=16, rounds=5),
        frozenset({"200", "429"}),
        needs_idle_server=True,
    ),
    Attack("unwritable-metadata", "9", flood(payloads.unwritable_metadata, rounds=3), _WRONG),
    Attack(
        "fair-share",
        "",
        flood(payloads.scored_prompts, copies=2, rounds=5),
        LOADED,
        is_load=True,
        has_keys=True,
    ),
    Attack(
        "open-files",
        "7",
        hold_connections,
        frozenset({"connected", "not connected"}),
        max_open_files=_OPEN_FILES,
    ),
    Attack(
        "special-tokens",
        "8",
        forge_special_tokens,
        frozenset({"text"}),
        prepare=_template_option,
    ),
    Attack("wrong-requests", "9", flood(payloads.wrong_requests, rounds=5), _WRONG),
    Attack(
        "wrong-chats",
        "9",
        flood(payloads.wrong_chats, rounds=2),
        _WRONG,
        prepare=_template_option,
    ),
    Attack("chunks", "10", send_chunks, frozenset({CLOSED})),
    Attack("structural-bodies", "11", flood(payloads.structural_bodies, rounds=10), REFUSED),
    *(
        Attack(
            name,
            "12",
            flood(payloads.chats, copies=3, rounds=3),
            REFUSED,
            prepare=_with_template(source),
        )
        for name, source in payloads.TEMPLATES.items()
    ),
    Attack(
        "tokenizer-panic",
        "13",
        flood(payloads.texts, rounds=5),
        frozenset({"400", "500"}),
        prepare=_with_tokenizer(payloads.hostile_tokenizer),
        is_sent_ids=True,
    ),
    Attack(
        "tokenizer-growth",
        "13",
        flood(payloads.texts, rounds=2),
        REFUSED,
        prepare=_with_tokenizer(payloads.growing_tokenizer),
        is_sent_ids=True,
    ),
    Attack(
        "tokenizer-growth-30",
        "13",
        flood(payloads.growing_texts, copies=4, rounds=2),
        SERVED,
        prepare=_with_tokenizer(partial(payloads.growing_tokenizer, factor=30, steps=1)),
        is_sent_ids=True,
    ),
    Attack(
        "forwarded-for",
        "15",
        flood(payloads.forwarded_for, rounds=1),
        frozenset({"400", "404"}),
        forbidden_in_log=("PWNED", "\x1b"),
    ),
    Attack("two-lengths", "17", send_two_lengths, frozenset({"one answer"})),
    Attack("half-close", "21", half_close, frozenset({"200"})),
    Attack(
        "left-with-a-byte",
        "",
        leave_behind_a_byte,
        frozenset({"stopped"}),
        is_load=True,
        needs_idle_server=True,
    ),
    Attack(
        "same-request-id",
        "22",
        flood(payloads.same_request_id, copies=40, rounds=20),
        LOADED,
        is_load=True,
    ),
    Attack(
        "long-stops", "23", flood(payloads.long_stops, copies=2, rounds=5), LOADED, is_load=True
    ),
    Attack("urgent", "", flood(payloads.urgent, copies=4, rounds=10), LOADED, is_load=True),
    Attack(
        "wide-beam-search", "", flood(payloads.wide_beam_search, rounds=5), LOADED, is_load=True
    ),
    Attack(
        "foreign-host",
        "",
        flood(payloads.foreign_hosts, rounds=2),
        frozenset({"400", "403", "421"}),
    ),
]
ATTACKS: Mapping[str, Attack] = {attack.name: attack for attack in _ALL}
FOR_ANY_SERVER = tuple(
    attack.name for attack in _ALL if attack.fits_any_server and attack.name != "none"
)


async def perform(attack: Attack, port: int, seconds: float, patience_s: float) -> Counter[str]:
    """Run one attack for at most `seconds`, and `patience_s` for answers that are due."""
    target = Target(port, time.monotonic() + seconds, patience_s)
    try:
        return await asyncio.wait_for(attack.run(target), seconds + patience_s + 2)
    except asyncio.TimeoutError:
        return Counter({NO_ANSWER: 1})
    except OSError:
        return Counter({CLOSED: 1})


async def take_turns(
    names: Sequence[str], port: int, seconds: float, patience_s: float = 0.0
) -> dict[str, dict[str, int]]:
    """Run attacks in turns until the time is over."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    end_s, turn = time.monotonic() + seconds, 0
    turn_s = seconds if len(names) == 1 else min(seconds, _TURN_S)
    while (left_s := end_s - time.monotonic()) > 0:
        name = names[turn % len(names)]
        outcomes[name].update(await perform(ATTACKS[name], port, min(turn_s, left_s), patience_s))
        turn += 1
        if len(names) == 1 and not patience_s:
            break
    return {name: dict(counts) for name, counts in outcomes.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack a running server; the last line has the outcomes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=positive, required=True, help="port on this machine")
    parser.add_argument(
        "--seconds", type=positive_number, default=15.0, help="how long (%(default)s)"
    )
    parser.add_argument("--only", default=",".join(FOR_ANY_SERVER), metavar="NAMES")
    parser.add_argument(
        "--patience-s",
        type=float,
        default=0.0,
        help="how long a request may wait behind other clients' load (%(default)s)",
    )
    parsed = parser.parse_args(arguments)
    names = parsed.only.split(",")
    print(BEGUN, flush=True)
    outcomes = asyncio.run(take_turns(names, parsed.port, parsed.seconds, parsed.patience_s))
    print(json.dumps(outcomes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
