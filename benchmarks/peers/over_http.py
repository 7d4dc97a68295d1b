"""A client of `nanovllm serve` in its own process, so that its processor time is separate.

A variant is JSON: {"url": of the server, "stream": true or false}. All requests are sent at once,
each on its own connection.
"""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

from benchmarks.worker import serve
from nanovllm.cli.bench.http_client import Server, events, pieces

Ask = Callable[[Server, dict[str, Any]], Coroutine[Any, Any, tuple[list[int], dict[str, Any]]]]


def load(_model: Path, variant: str, _threads: int) -> tuple[Any, dict[str, Any]]:
    """Return a client; model and threads are the server's."""
    wanted = json.loads(variant)
    server, ask = Server.at(wanted["url"]), _streamed if wanted["stream"] else _whole

    def generate(
        prompts: list[list[int]], lengths: list[int], is_checked: bool = False
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Return token ids if `is_checked`, else zeros: ids would make responses longer."""
        bodies = [
            {
                "prompt": prompt,
                "max_tokens": length,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": is_checked,
            }
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        before_s = time.process_time()
        answers = asyncio.run(_ask_all(ask, server, bodies))
        client_s = time.process_time() - before_s
        cached = sum(
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for _, usage in answers
        )
        token_ids = [
            ids if is_checked else [0] * usage["completion_tokens"] for ids, usage in answers
        ]
        return token_ids, {"cached_tokens": cached, "client_seconds": client_s}

    return generate, {}


async def _ask_all(
    ask: Ask, server: Server, bodies: list[dict[str, Any]]
) -> list[tuple[list[int], dict[str, Any]]]:
    return list(await asyncio.gather(*[ask(server, body) for body in bodies]))


async def _whole(server: Server, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Return the token ids, if requested, and the usage of a whole response."""
    async with aclosing(pieces(server, "POST", "/v1/completions", body)) as stream:
        answer = json.loads(b"".join([piece async for _, piece in stream]))
    return answer["choices"][0].get("token_ids") or [], answer["usage"]


async def _streamed(server: Server, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Return the same of a stream."""
    token_ids: list[int] = []
    usage: dict[str, Any] = {}
    async with aclosing(
        events(
            server,
            "/v1/completions",
            {**body, "stream": True, "stream_options": {"include_usage": True}},
        )
    ) as stream:
        async for _, event in stream:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                token_ids += choice.get("token_ids") or []
    return token_ids, usage


if __name__ == "__main__":
    serve(load)
