"""Embed nanovllm in a FastAPI application: custom endpoints, one batch for all clients.

Run: python examples/fastapi_app.py
Try: curl -N 'http://127.0.0.1:8000/story?beginning=Once+upon+a+time'
     curl 'http://127.0.0.1:8000/endings?text=The+king&count=3'

For OpenAI's API, use `nanovllm serve` instead.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import StreamingResponse

from nanovllm import AsyncLLM, InvalidRequestError, QueueFullError, SamplingParams


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model before the first request, and close it after the last one."""
    async with AsyncLLM("tiny-books") as llm:
        app.state.llm = llm
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/story")
async def story(
    request: Request, beginning: Annotated[str, Query(min_length=1, max_length=100)]
) -> StreamingResponse:
    """Stream a story as plain text. A client that disconnects aborts its request.

    The query is validated first, because the status cannot change once the stream has started.
    """
    llm: AsyncLLM = request.app.state.llm
    params = SamplingParams(temperature=0.8, max_tokens=60, seed=7)

    async def pieces() -> AsyncIterator[str]:
        yield beginning
        async for output in llm.stream(beginning, params):
            yield output.outputs[0].text

    return StreamingResponse(pieces(), media_type="text/plain")


@app.get("/endings")
async def endings(request: Request, text: str, count: int = 2) -> list[str]:
    """Return several continuations of a text."""
    llm: AsyncLLM = request.app.state.llm
    try:
        output = await llm.complete(text, SamplingParams(n=count, max_tokens=16))
    except InvalidRequestError as error:
        raise HTTPException(400, str(error)) from error
    except QueueFullError as error:
        retry_after = {"Retry-After": str(error.retry_after_s)}
        raise HTTPException(429, str(error), retry_after) from error
    return [answer.text for answer in output.outputs]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
