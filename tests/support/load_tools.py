"""How load tools read a stream of completions, which is not what the standard of events says.

Each takes the reads of a connection and returns the text. `vllm bench serve` strips each read and
takes what is left for the beginning of the next event unless it is complete; LLMPerf and SGLang
drop six characters from every line that is not empty.
"""

import json
from collections.abc import Callable, Iterable

_PREFIX = "data: "


def read_like_vllm(reads: Iterable[bytes]) -> str:
    """Return the text as vllm/benchmarks/lib/endpoint_request_func.py finds it."""
    text = buffer = ""
    for read in reads:
        buffer += read.strip().decode()
        *events, buffer = buffer.split("\n\n")
        if _is_complete(buffer):
            events, buffer = [*events, buffer], ""
        for event in filter(None, map(str.strip, events)):
            if not event.startswith(":"):
                text += _text_of(event.removeprefix(_PREFIX))
    return text


def _is_complete(buffer: str) -> bool:
    content = buffer.removeprefix(_PREFIX)
    try:
        return buffer.startswith(_PREFIX) and (content == "[DONE]" or bool(json.loads(content)))
    except json.JSONDecodeError:
        return False


def read_like_llmperf(reads: Iterable[bytes]) -> str:
    """Return the text as LLMPerf and SGLang's bench_serving find it; raises JSONDecodeError."""
    lines = b"".join(reads).decode().split("\n")
    return "".join(_text_of(line.strip()[len(_PREFIX) :]) for line in lines if line.strip())


def _text_of(content: str) -> str:
    if content == "[DONE]":
        return ""
    return "".join(choice["text"] for choice in json.loads(content)["choices"])


READERS: tuple[Callable[[Iterable[bytes]], str], ...] = (read_like_vllm, read_like_llmperf)
