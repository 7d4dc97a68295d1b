"""LLM: offline batched inference in three lines, with vLLM's names and shapes."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import overload

from typing_extensions import Self

from nanovllm.config import (
    BackendName,
    DType,
    EngineConfig,
    KVCacheDType,
    Quantization,
    SchedulingPolicy,
)
from nanovllm.engine.beam_search import BeamSearchParams, begin_searches, only_position
from nanovllm.engine.call_runner import CallRunner
from nanovllm.engine.chat.messages import Messages, list_conversations
from nanovllm.engine.chat.prompts import ChatPrompts
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import PreparedRequest, naming_prompt, sampling_defaults
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.request import Pooling
from nanovllm.engine.token_rates import TokenRates
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineNotReadyError, InvalidRequestError
from nanovllm.hub import BUNDLED_MODEL, resolve_model
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput
from nanovllm.progress import progress_bar
from nanovllm.prompts import Prompt, list_prompts
from nanovllm.sampling_params import SamplingParams, list_params
from nanovllm.vllm_settings import explain_unknown_settings


class LLM:
    """A model ready to generate.

    It may be used from any number of threads, and by `asyncio.to_thread`: calls made at the same
    time are answered in one batch, each with its own outputs. As a context manager it is closed at
    the end.

    >>> llm = LLM("gpt2")
    >>> llm.generate("Once upon a time", SamplingParams(temperature=0.8))[0].outputs[0].text
    """

    @explain_unknown_settings
    def __init__(
        self,
        model: str | os.PathLike[str] = BUNDLED_MODEL,
        *,
        dtype: DType = "float32",
        quantization: Quantization | None = None,
        kv_cache_dtype: KVCacheDType = "auto",
        backend: BackendName = "numba",
        max_model_len: int | None = None,
        block_size: int = 32,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        kv_cache_memory: int | str = "1GiB",
        num_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        num_threads: int | None = None,
        seed: int | None = None,
        max_logprobs: int = 20,
        scheduling_policy: SchedulingPolicy = "fcfs",
    ) -> None:
        """Load a model by folder, by name ("gpt2", "any/repo"), or the bundled one.

        The settings are those of EngineConfig, whose docstring and docs/python-api.md explain them.

        Raises:
            ModelNotFoundError: the name leads nowhere.
            CheckpointError: the folder cannot be used.
            ValueError: a setting is wrong.
            TypeError: there is no setting of that name.
        """
        config = EngineConfig(
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            backend=backend,
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            num_blocks=num_blocks,
            enable_prefix_caching=enable_prefix_caching,
            batch_invariant=batch_invariant,
            num_threads=num_threads,
            seed=seed,
            max_logprobs=max_logprobs,
            scheduling_policy=scheduling_policy,
        )
        self._name = os.fspath(model)
        folder = resolve_model(model)
        self._engine: Engine | None = Engine.load(folder, config)
        self._calls = CallRunner(self._engine)
        self._chats = ChatPrompts(folder, self._engine.input_processor)

    def __repr__(self) -> str:
        if self._engine is None:
            return f"LLM({self._name!r}, closed)"
        config = self._engine.config
        types = f"dtype={config.dtype!r}" + (
            f", quantization={config.quantization!r}" if config.quantization else ""
        )
        return (
            f"LLM({self._name!r}, {types}, backend={config.backend!r}, "
            f"max_model_len={self._engine.max_model_len}, "
            f"num_parameters={self._engine.model.parameters})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the model's memory. Calls under way raise EngineNotReadyError. Harmless twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            self._calls.close()
            self._chats.close()
            engine.close()

    @property
    def engine(self) -> Engine:
        """The engine; raises EngineNotReadyError after `close`."""
        engine = self._engine
        if engine is None:
            raise EngineNotReadyError("this LLM is closed; make another one")
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer: `encode(text)`, `decode(token_ids)` and more."""
        return self.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """Return the settings of calls that give none.

        They are those of the model's generation_config.json, otherwise SamplingParams's own.
        """
        return SamplingParams(**sampling_defaults(self.engine.generation_config))

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs come in the order of the prompts.

        An error that ends one answer is told by its output, whose `error` says why and whose
        `finish_reason` is "error"; the others are not affected.

        Args:
            prompts: one or several: text, {"prompt": text}, {"prompt_token_ids": ids}, token ids.
                Several come as any iterable; token ids as a list or a NumPy array.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show prompts done, prefill and decode tokens per second, on a terminal or in
                a notebook.

        Raises:
            InvalidRequestError: a prompt or its settings are wrong; nothing was run.
            EngineNotReadyError: the LLM is closed.
        """
        prepared_requests = self._prepare_all(list_prompts(prompts), sampling_params)
        self._run(prepared_requests, use_tqdm)
        return [prepared.output_processor.output() for prepared in prepared_requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Yield the answer to one prompt as it grows: each output has only what is new.

        Leaving the loop, or closing the generator, aborts the request. Other threads may generate
        and stream meanwhile.

        Raises:
            InvalidRequestError: the prompt or its settings are wrong.
            EngineFaultError: the answer ended with an error; raised by the generator.
            EngineNotReadyError: the LLM is closed.
        """
        (prepared,) = self._prepare_all([prompt], sampling_params)
        return self._calls.stream(prepared)

    def chat(
        self,
        messages: Iterable[Mapping[str, object] | Messages],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or every one of several, by the model's chat template.

        A token that the template ends a turn with ends the answer. Otherwise as `generate`.

        Args:
            messages: a list of {"role": "user", "content": "..."}, or several such lists. Roles
                are system, developer, user and assistant.
            sampling_params: for all conversations, or one for each.
            use_tqdm: show progress.
            chat_template: the text of a Jinja template, or the path of a file with one, in place
                of the model's own.
            add_generation_prompt: end the prompt with the beginning of the assistant's answer.
            continue_final_message: go on with the last message instead; only without
                add_generation_prompt.

        Raises:
            InvalidRequestError: a message is wrong, or there is no template.
            CheckpointError: the template is not valid.
        """
        conversations = list_conversations(messages)
        params = self._each_params(sampling_params, len(conversations))
        template = self._chats.template(chat_template)
        prompts: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            with naming_prompt(index, len(conversations)):
                token_ids = self._chats.encode(
                    template,
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
                prompts.append(token_ids)
        prepared_requests = self._prepare_all(
            prompts, [self._chats.params(template, p) for p in params]
        )
        self._run(prepared_requests, use_tqdm)
        outputs = [prepared.output_processor.output() for prepared in prepared_requests]
        for output in outputs:
            output.prompt = self.tokenizer.decode(
                output.prompt_token_ids, skip_special_tokens=False
            )
        return outputs

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Generator[RequestOutput, None, None]:
        """Yield the answer to one conversation as `stream` does; arguments are those of `chat`."""
        conversations = list_conversations(messages)
        if len(conversations) != 1:
            raise InvalidRequestError(
                f"there are {len(conversations)} conversations, a stream takes one; call it again",
                param="messages",
            )
        (params,) = self._each_params(sampling_params, 1)
        template = self._chats.template(chat_template)
        prompt = self._chats.encode(
            template,
            conversations[0],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self.stream(prompt, self._chats.params(template, params))

    @overload
    def beam_search(
        self, prompts: Iterable[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[RequestOutput]: ...

    @overload
    def beam_search(
        self, prompts: Prompt, params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[RequestOutput]: ...

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Return the most probable answers to every prompt, `beam_width` each, the best first.

        Their cumulative_logprob is the whole answer's. A search that ends with an error has no
        answers, and its output's `error` says why.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"params is a {type(params).__name__} but must be a BeamSearchParams"
            )
        input_processor = self.engine.input_processor
        searches = begin_searches(list_prompts(prompts), params, input_processor)
        with progress_bar(
            total=params.max_tokens, desc="Tokens", unit="token", is_wanted=use_tqdm
        ) as progress:
            while going := [search for search in searches if not search.is_finished]:
                asked = [
                    [
                        input_processor.submit(
                            input_processor.new_request_id("beam"), ids, params.step_params
                        )
                        for ids in search.prompts()
                    ]
                    for search in going
                ]
                self._run([prepared for beams in asked for prepared in beams], use_tqdm=False)
                for search, beams in zip(going, asked, strict=True):
                    outputs = [prepared.output_processor.output() for prepared in beams]
                    error = next((one.error for one in outputs if one.error is not None), None)
                    if error is not None:
                        search.fail(error)
                    else:
                        search.advance([only_position(output) for output in outputs])
                progress.update()
        return [
            search.output(input_processor.new_request_id("llm"), self.tokenizer, params.beam_width)
            for search in searches
        ]

    @overload
    def embed(
        self,
        prompts: Iterable[Prompt],
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]: ...

    @overload
    def embed(
        self,
        prompts: Prompt,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]: ...

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Return every prompt as a vector, in the order of the prompts.

        The vector is the final hidden state of its tokens, after the last layer norm. An error that
        ends one prompt is told by its output, whose `error` says why and whose embedding is empty;
        the others are not affected.

        Args:
            prompts: as for `generate`; each may fill the context.
            pooling: "last" for the state of the last token, "mean" for the mean of all.
            normalize: scale to length 1, so that the product of two vectors is their cosine.
            use_tqdm: show progress on a terminal or in a notebook.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        listed = list_prompts(prompts)
        input_processor = self.engine.input_processor

        def submit(index: int, request_id: str) -> PreparedRequest:
            return input_processor.embed(
                request_id, listed[index], pooling=pooling, normalize=normalize
            )

        prepared_requests = self._submit_each(len(listed), submit)
        self._run(prepared_requests, use_tqdm)
        return [prepared.output_processor.embedding_or_error() for prepared in prepared_requests]

    def _each_params(
        self, params: SamplingParams | Iterable[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        """Return the settings of each prompt, by default the model's own."""
        given = self.default_sampling_params() if params is None else params
        return list_params(given, num_prompts)

    def _prepare_all(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
    ) -> list[PreparedRequest]:
        input_processor = self.engine.input_processor
        params = self._each_params(sampling_params, len(prompts))

        def submit(index: int, request_id: str) -> PreparedRequest:
            prepared = input_processor.submit(request_id, prompts[index], params[index])
            if prepared.grammar is not None:
                prepared.grammar.wait()
            return prepared

        return self._submit_each(len(prompts), submit)

    def _submit_each(
        self, count: int, submit: Callable[[int, str], PreparedRequest]
    ) -> list[PreparedRequest]:
        """Call `submit(index, request_id)` for every prompt; an error names the prompt at fault."""
        prepared_requests = []
        for index in range(count):
            with naming_prompt(index, count):
                prepared_requests.append(
                    submit(index, self.engine.input_processor.new_request_id("llm"))
                )
        return prepared_requests

    def _run(self, prepared_requests: Sequence[PreparedRequest], use_tqdm: bool) -> None:
        """Work until every prepared has ended."""
        rates = TokenRates()
        bar = progress_bar(
            total=len(prepared_requests), desc="Prompts", unit="prompt", is_wanted=use_tqdm
        )

        def show(stats: StepStats, num_ended: int) -> None:
            rates.add(stats)
            bar.set_postfix_str(str(rates), refresh=False)
            bar.update(num_ended)

        with bar:
            self._calls.run(prepared_requests, None if bar.disable else show)
