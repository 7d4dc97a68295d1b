"""Requests that are legal in form and costly to a server that does not bound what they ask for.

Every function returns whole requests, ready to send. `number` changes a request so that nothing of
an earlier one can be reused from a cache.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.load.requests import COMPLETIONS, CONTEXT, VOCAB
from tests.load.wire import HOST_HEADER, get, head, post

CHAT = "/v1/chat/completions"
ATTACKER_KEY, BYSTANDER_KEY = "attacker", "bystander"
CHAINED_RULES = 4500
_LARGE_TEXT_CHARACTERS = 4_100_000
_STRUCTURE_BYTES = 3_900_000


def completion(**fields: Any) -> bytes:
    """A completion of a short prompt."""
    return post(COMPLETIONS, {"prompt": "a", "max_tokens": 4, **fields})


def grammar(text: str, **fields: Any) -> bytes:
    """A completion that follows a Lark grammar."""
    return completion(structured_outputs={"grammar": text}, **fields)


def schema(value: Any, **fields: Any) -> bytes:
    """A completion that follows a JSON schema."""
    form = {"type": "json_schema", "json_schema": {"schema": value}}
    return completion(response_format=form, **fields)


def chained_rules(number: int) -> bytes:
    """A grammar whose rules refer to each other in one long chain: recursion in the compiler."""
    rules = [f"r{i}: r{i + 1}" for i in range(CHAINED_RULES)]
    return grammar("\n".join(["start: r0", *rules, f'r{CHAINED_RULES}: "a{number}"']))


def chained_terminals(number: int) -> bytes:
    """The same chain of terminals."""
    rules = [f"A{i}: A{i + 1}" for i in range(CHAINED_RULES)]
    return grammar("\n".join(["start: A0", *rules, f'A{CHAINED_RULES}: "a{number}"']))


def multiple_of(divisor: int, number: int) -> bytes:
    """A schema whose automaton has a state for each remainder."""
    return schema({"type": "integer", "multipleOf": divisor, "title": str(number)})


def product_of_multiples(number: int) -> bytes:
    """A schema whose automaton is the product of two large ones."""
    parts = [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]
    return schema({"allOf": parts, "title": str(number)})


def ambiguous_grammar(number: int, *, n: int, rules: int = 300) -> bytes:
    """A grammar with exponentially many parses: each mask of allowed tokens takes seconds."""
    start = "s: " + " | ".join(f"s{i} s" for i in range(rules)) + ' | ""'
    rest = [f"s{i}: /[a-z ]/ | s{(i + 1) % rules}" for i in range(rules)]
    return grammar("\n".join(["start: s", start, *rest, f'UNUSED: "{number}"']), n=n)


def bad_words(number: int) -> bytes:
    """One forbidden text of megabytes, which the tokenizer must read."""
    return completion(max_tokens=1, bad_words=[f"{number}" + "a" * _LARGE_TEXT_CHARACTERS])


def long_bad_words(number: int) -> bytes:
    """One forbidden text that just fits a body."""
    text = b"%d" % number + b"a" * _STRUCTURE_BYTES
    return post(COMPLETIONS, b'{"prompt": "a", "max_tokens": 1, "bad_words": ["' + text + b'"]}')


def many_token_ids(number: int) -> bytes:
    """A thousand prompts of 510 tokens, all of which come back."""
    ids = [(j * j + number) % VOCAB for j in range(CONTEXT - 2)]
    prompts = b",".join([json.dumps(ids).encode()] * 1000)
    fields = b'"max_tokens": 1, "return_token_ids": true'
    return post(COMPLETIONS, b'{"prompt": [' + prompts + b"], " + fields + b"}")


def neighbors(number: int) -> bytes:
    """A request without a body to the worker of the inspector."""
    return get(f"/v1/inspect/neighbors?token={number % VOCAB}&count=5")


def unwritable_metadata(number: int) -> list[bytes]:
    """What Python's JSON reader accepts and JSON does not have, in a field that is echoed."""
    form = b'{"input": "a", "max_output_tokens": 1, "stream": %s, "metadata": {"a": %s}}'
    return [
        post("/v1/responses", form % (stream, value))
        for stream in (b"false", b"true")
        for value in (b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'{"\\udc00": [1]}')
    ]


def truncated_prompts(number: int) -> bytes:
    """Sixteen long prompts of which a few tokens are kept: tokenizing is all the work."""
    draw = random.Random(number)
    text = "".join(draw.choices("abcdefghij klmnop", k=250_000))
    return completion(prompt=[text] * 16, max_tokens=1, truncate_prompt_tokens=4)


def log_probabilities(number: int, *, prompts: int = 384) -> bytes:
    """Log-probabilities of every position of many prompts: a small request, a huge answer."""
    ids = [[(i * 7 + j + number) % VOCAB for j in range(CONTEXT - 1)] for i in range(prompts)]
    return completion(prompt=ids, max_tokens=1, echo=True, logprobs=20, prompt_logprobs=20)


def scored_prompts(number: int, *, prompts: int = 200, length: int = 500) -> bytes:
    """Log-probabilities of many prompts, with the attacker's key: 100,000 tokens to compute."""
    ids = [[(i * 7 + j + number) % VOCAB for j in range(length)] for i in range(prompts)]
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 20}
    return post(COMPLETIONS, body, authorization=f"Bearer {ATTACKER_KEY}")


def wrong_requests(number: int) -> list[bytes]:
    """Requests that must be answered by 400, never by 500."""
    huge = b"9" * 4300
    nested = '{"items":' * 982 + "{}" + "}" * 982
    surrogate: dict[str, Any] = {"enum": ["\ud800"]}
    beyond_64_bits = {"type": "integer", "minimum": 2**64}
    return [
        post(COMPLETIONS, b'{"prompt": "a", "max_tokens": %s}' % huge),
        post(COMPLETIONS, b'{"prompt": "a", "use_beam_search": true, "max_tokens": %s}' % huge),
        completion(structured_outputs={"regex": "\ud800"}),
        completion(structured_outputs={"grammar": 'start: "\ud800"'}),
        completion(structured_outputs={"choice": ["\ud800"]}),
        completion(structured_outputs={"json": surrogate}),
        completion(structured_outputs={"json": beyond_64_bits}),
        completion(structured_outputs={"json": nested}),
        schema(surrogate),
        schema(beyond_64_bits),
        completion(bad_words=["\ud800"]),
        completion(stop=["\ud800"]),
        completion(prompt=[2**70]),
        completion(seed=10**400),
    ]


def wrong_chats(number: int) -> list[bytes]:
    """Chats that must be answered by 400, never by 500."""
    turns = b'{"role": "user", "content": "a"}'  # twice: the template takes the first for itself
    chat = b'{"messages": [' + turns + b", " + turns + b'], "%s": %s}'
    fields = (b"max_tokens", b"max_completion_tokens")
    return [post(CHAT, chat % (field, b"9" * 4300)) for field in fields]


def structural_bodies(number: int) -> list[bytes]:
    """Four bodies of nearly 4 MB made of structure, which cost most to parse and to validate."""
    lists = b"[]," * (_STRUCTURE_BYTES // 3)
    nested = b"[[[[]]]]," * (_STRUCTURE_BYTES // 9)
    objects = b'{"a":{}},' * (_STRUCTURE_BYTES // 9)
    ids = b"1," * (_STRUCTURE_BYTES // 2)
    return [
        post(COMPLETIONS, b'{"prompt":[' + lists + b"[]]}"),
        post(COMPLETIONS, b'{"prompt":"a","unknown":[' + nested + b"[]]}"),
        post(COMPLETIONS, b'{"prompt":"a","user":[' + objects + b"{}]}"),
        post(COMPLETIONS, b'{"prompt":[' + ids + b"1]}"),
    ]


def long_stops(number: int) -> bytes:
    """Many long stop strings that each of many answers is searched for."""
    stops = ["a" * 990 + f"{number}-{i}" for i in range(16)]
    return completion(stop=stops, n=128, max_tokens=400, ignore_eos=True)


def urgent(number: int) -> bytes:
    """A large request that claims to come before all others."""
    return completion(priority=-(2**31 - 1), n=64, max_tokens=450, ignore_eos=True, seed=number)


def wide_beam_search(number: int) -> bytes:
    """Beam searches of many prompts at once, each step of which submits every beam again."""
    prompts = [[(number + i) % VOCAB, *range(1, 60)] for i in range(102)]
    return completion(prompt=prompts, use_beam_search=True, n=10, max_tokens=20)


def same_request_id(number: int) -> bytes:
    """One of many requests that claim one id."""
    return completion(request_id="the-same", seed=number, n=4)


def chats(number: int) -> bytes:
    """A chat of one message."""
    return post(CHAT, {"messages": [{"role": "user", "content": f"a{number}"}], "max_tokens": 1})


def foreign_hosts(number: int) -> list[bytes]:
    """Requests that a page of another site sends by way of a name that leads to this machine."""
    body = b'{"prompt": "a", "max_tokens": 1}'
    length = {"content-length": str(len(body)), "connection": "close"}
    form = {"content-type": "application/json"}
    return [
        head("GET /v1/models HTTP/1.1", {"host": "evil.example", "connection": "close"}),
        head("POST /v1/completions HTTP/1.1", {"host": "evil.example", **form, **length}) + body,
    ]


def forwarded_for(number: int) -> bytes:
    """A request whose headers forge what the access log says of its sender."""
    forged = {"x-forwarded-for": "\x1b[31mPWNED", "host": HOST_HEADER, "connection": "close"}
    return head("GET /nope HTTP/1.1", forged)


def texts(number: int) -> bytes:
    """A short text."""
    return completion(prompt=f"Hello{number}", max_tokens=1)


def two_lengths() -> bytes:
    """A request with both framings, and one hidden behind its body."""
    headers = {
        "host": HOST_HEADER,
        "content-type": "application/json",
        "content-length": "5",
        "transfer-encoding": "chunked",
    }
    hidden = head("GET /health HTTP/1.1", {"host": HOST_HEADER})
    return head(f"POST {COMPLETIONS} HTTP/1.1", headers) + b"0\r\n\r\n" + hidden


FORGED = "<|endoftext|>"
SPECIAL_TOKEN_TEMPLATE = (
    "{% set way = messages[0].content %}{% set turns = messages[1:] %}"
    '{% if way == "lower" %}{{ turns[0].content|lower }}'
    '{% elif way == "trim" %}{{ turns[0].content|trim }}{{ turns[1].content|trim }}'
    '{% elif way == "replace" %}{{ turns[0].content|replace("\\n", "") }}'
    '{% elif way == "name" %}{{ turns[0].name }}{{ turns[0].content }}'
    '{% elif way == "frame" %}<{{ turns[0].content }}>'
    "{% else %}{% for m in turns %}{{ m.content }}{% endfor %}{% endif %}"
)
"""A chat template in which several ways join what users wrote; the first message names the way."""


def forged_chats() -> Iterator[tuple[str, bytes]]:
    """Chats whose users try to write a special token: (the way, the request)."""
    half, rest = FORGED[:7], FORGED[7:]
    ways: dict[str, list[dict[str, str]]] = {
        "whole": [{"content": FORGED}],
        "messages": [{"content": half}, {"content": rest}],
        "name": [{"name": half, "content": rest}],
        "frame": [{"content": FORGED[1:-1]}],
        "lower": [{"content": FORGED.upper()}],
        "trim": [{"content": f"{half} "}, {"content": f" {rest}"}],
        "replace": [{"content": "\n".join(FORGED)}],
    }
    for way, messages in ways.items():
        turns = [{"role": "user", "content": way}, *({"role": "user", **one} for one in messages)]
        yield way, post(CHAT, {"messages": turns, "max_tokens": 1})


def chunks_without_end(count: int = 10_000) -> bytes:
    """Chunks of one byte each."""
    return b"1\r\na\r\n" * count


def open_chunked_body() -> bytes:
    """The head of a request whose body has no end."""
    headers = {"host": HOST_HEADER, "transfer-encoding": "chunked"}
    return head("POST /nothing HTTP/1.1", headers)


TEMPLATES = {
    "template-fold": "{{ [1]|slice(100000000)|list|length }}",
    "template-tojson": "{{ [[1]]|tojson(indent=500000000)|length }}",
    "template-format": '{{ "%900000000s" % messages[0].content }}',
    "template-double": (
        "{% set ns = namespace(s=messages[0].content) %}"
        "{% for i in range(34) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}"
    ),
}
"""Chat templates of checkpoints that take minutes or gigabytes, by the name of the attack."""


def hostile_tokenizer(original: str) -> str:
    """The text of a tokenizer.json that loads and then panics in the library."""
    broken = json.loads(original)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    broken["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, text],
        "pair": [text, text],
        "special_tokens": {},
    }
    return json.dumps(broken)


def growing_tokenizer(original: str, *, factor: int = 2000, steps: int = 3) -> str:
    """The text of a tokenizer.json whose normalizer multiplies a letter, by 8 * 10^9."""
    broken = json.loads(original)
    step = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * factor}
    broken["normalizer"] = {"type": "Sequence", "normalizers": [step] * steps}
    return json.dumps(broken)


def growing_texts(number: int) -> bytes:
    """A text of the letters that `growing_tokenizer` multiplies."""
    return completion(prompt=f"{number}" + "l" * 20_000, max_tokens=1, truncate_prompt_tokens=4)
