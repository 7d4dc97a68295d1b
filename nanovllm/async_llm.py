"""AsyncLLM: generate and stream from asyncio code, on the AsyncEngine of the server."""

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypedDict

from typing_extensions import Self, Unpack

from nanovllm.config import EngineConfig, EngineSettings
from nanovllm.deadlines import Deadline
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineNotReadyError
from nanovllm.hub import BUNDLED_MODEL, resolve_models
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams, list_params
from nanovllm.vllm_settings import takes_settings


class RequestOptions(TypedDict, total=False):
    """What a request may have beside its prompt, its settings and its id."""

    priority: int
    cache_salt: str
    client: str
    timeout_s: float | None


class AsyncLLM:
    """A model for asyncio code: any number of tasks of one event loop share a batch.

    The weights are loaded by a thread when the first request, or `start`, waits for them. A task
    that is cancelled, or leaves its loop, aborts its request. As an asynchronous context
    manager it is started at the beginning and closed at the end.

    >>> llm = AsyncLLM("gpt2")
    >>> async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=32)):
    ...     print(output.outputs[0].text)
    """

    @takes_settings(EngineConfig)
    def __init__(
        self, model: str | os.PathLike[str] = BUNDLED_MODEL, **settings: Unpack[EngineSettings]
    ) -> None:
        """Find the model and check the settings, which are those of `LLM`; raises as `LLM`.

        What is wrong with the weights is raised by `start`.
        """
        folder, config = resolve_models(model, EngineConfig(**settings))
        self._name = os.fspath(model)
        Engine.check(folder, config)
        self._engine = AsyncEngine(lambda: Engine.load(folder, config))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        weakref.finalize(self, self._engine.abandon)

    def __repr__(self) -> str:
        return (
            f"AsyncLLM({self._name!r}, {'closed' if self._is_closed else self._engine.state.value})"
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Wait until the model is loaded, which the first call of this or of a request begins.

        Raises CheckpointError or ValueError where it cannot be loaded, EngineNotReadyError after
        `close` and in another event loop than that of the first call.
        """
        if self._is_closed:
            raise EngineNotReadyError("this AsyncLLM is closed; make another one")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            await self._engine.start()
        elif self._loop is not loop:
            raise EngineNotReadyError(
                "this AsyncLLM belongs to the event loop that used it first; make one in each "
                "loop, or use LLM, which any thread may call"
            )
        await self._engine.wait_until_ready()

    async def close(self) -> None:
        """End all requests, which raise EngineNotReadyError, and the thread.

        A second call has no effect.
        """
        if not self._is_closed:
            self._is_closed = True
            await self._engine.stop()

    async def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer, once it is loaded."""
        await self.start()
        return self._engine.engine.tokenizer

    async def default_sampling_params(self) -> SamplingParams:
        """Return the settings of requests that give none, as LLM's."""
        await self.start()
        return SamplingParams(**self._engine.engine.sampling_defaults)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the answer so far whenever it has grown, as vLLM does.

        Args:
            prompt: text, {"prompt": text}, {"prompt_token_ids": ids}, or token ids.
            sampling_params: settings; by default the model's own.
            request_id: part of the id in outputs, which is unique.
            options: `priority`: lower is served first; only with scheduling_policy="priority".
                `cache_salt`: prefixes are shared in the cache among requests of one salt.
                `client`: identity of who sent it, text; clients share the engine with
                scheduling_policy="fair".
                `timeout_s`: longest time that the answer may take, in seconds.

        Raises:
            InvalidRequestError: the request can never be answered.
            QueueFullError: too many requests are unfinished.
            RequestTimeoutError: it was not answered within `timeout_s`.
            EngineFaultError: the answer ended with an error.
            EngineNotReadyError: closed, or used in another event loop.
        """
        with await self._begin(prompt, sampling_params, request_id, **options) as handle:
            async with aclosing(handle.deltas()) as deltas:
                async for _ in deltas:
                    yield handle.prompts[0].output()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the answer as it grows: each output has only what is new. Else as `generate`."""
        with await self._begin(prompt, sampling_params, request_id, **options) as handle:
            async with aclosing(handle.deltas()) as deltas:
                async for _, delta in deltas:
                    yield delta

    async def complete(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestOutput:
        """Return the whole answer; arguments and errors are those of `generate`."""
        with await self._begin(prompt, sampling_params, request_id, **options) as handle:
            await handle.wait()
            return handle.prompts[0].output()

    async def _begin(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestHandle:
        """Queue a request, once the model is loaded."""
        if params is None:
            params = await self.default_sampling_params()
        (checked,) = list_params(params, 1)
        await self.start()
        request = GenerationRequest(
            prompts=[prompt],
            params=checked,
            request_id=request_id or "request",
            priority=priority,
            cache_salt=cache_salt,
            client=client,
        )
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        return self._engine.generate(self._engine.prepare(request), deadline=deadline)
