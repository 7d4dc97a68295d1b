"""LLM: offline batched inference in three lines, with vLLM's names."""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, overload

from typing_extensions import Self, Unpack

from nanovllm.config import EngineConfig, EngineSettings
from nanovllm.engine.beam_search import BeamSearches
from nanovllm.engine.call_runner import CallRunner
from nanovllm.engine.chat.messages import Messages, list_conversations
from nanovllm.engine.chat.prompts import ChatPrompts, prompt_end
from nanovllm.engine.chat.template import PromptEnd
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import (
    BeamSearchParams,
    GenerationRequest,
    PoolingParams,
)
from nanovllm.engine.input_processor import naming_prompt
from nanovllm.engine.metrics import StepStats, TokenRates
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import Pooling
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineNotReadyError, InvalidRequestError
from nanovllm.hub import BUNDLED_MODEL, resolve_models
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput
from nanovllm.progress import progress_bar
from nanovllm.prompts import Prompt, list_prompts
from nanovllm.sampling_params import SamplingParams, list_params
from nanovllm.vllm_settings import takes_settings


class LLM:
    """A model ready to generate.

    Any number of threads may use it; concurrent calls run in one batch, each with its own outputs.
    As a context manager it is closed at the end.

    >>> llm = LLM("gpt2")
    >>> llm.generate("Once upon a time", SamplingParams(temperature=0.8))[0].outputs[0].text
    """

    @takes_settings(EngineConfig)
    def __init__(
        self, model: str | os.PathLike[str] = BUNDLED_MODEL, **settings: Unpack[EngineSettings]
    ) -> None:
        """Load a model by folder, by name ("gpt2", "any/repo"), or the bundled one.

        EngineConfig and docs/reference/python-api.md explain the settings.

        Raises:
            ModelNotFoundError: there is no model of that name.
            CheckpointError: the folder is not valid.
            ValueError: a setting is wrong.
            TypeError: there is no setting of that name.
        """
        folder, config = resolve_models(model, EngineConfig(**settings))
        self._name = os.fspath(model)
        self._engine: Engine | None = Engine.load(folder, config)
        self._calls = CallRunner(self._engine)
        self._chats = ChatPrompts(folder, self._engine.input_processor)

    def __repr__(self) -> str:
        if self._engine is None:
            return f"LLM({self._name!r}, closed)"
        config = self._engine.config
        quantization = f", quantization={config.quantization!r}" if config.quantization else ""
        return (
            f"LLM({self._name!r}, dtype={config.dtype!r}{quantization}, "
            f"backend={config.backend!r}, "
            f"max_model_len={self._engine.max_model_len}, "
            f"num_parameters={self._engine.model.num_parameters})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the model's memory; unfinished calls raise EngineNotReadyError."""
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
        """Return SamplingParams with the defaults of the model's generation_config.json."""
        return SamplingParams(**self.engine.sampling_defaults)

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
        """Generate completions of all prompts; return an output for each, in their order.

        An error ends one request only; its output has the `error` and "error" as finish_reason.

        Args:
            prompts: one or an iterable of several: text, token ids as a list or a NumPy array,
                {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show prompts done, prefill and decode tokens per second, on a terminal or in
                a notebook.

        Raises:
            InvalidRequestError: a prompt or its settings are wrong; there are no outputs.
            EngineNotReadyError: the LLM is closed.
        """
        listed = list_prompts(prompts)
        params = self._each_params(sampling_params, len(listed))
        processed = self._process_each(listed, params)
        self._run(processed, use_tqdm)
        return [prompt.output() for prompt in processed]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Yield the new text and tokens of one prompt's completion after each step.

        Leaving the loop, or closing the generator, aborts the request.

        Raises:
            InvalidRequestError: the prompt or its settings are wrong.
            EngineFaultError: the request ended with an error; raised by the generator.
            EngineNotReadyError: the LLM is closed.
        """
        (processed,) = self._process_each([prompt], self._each_params(sampling_params, 1))
        return self._calls.stream(processed)

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
        """Answer one or several conversations, with the model's chat template.

        The template's end-of-turn token ends the answer. Otherwise as `generate`.

        Args:
            messages: a list of {"role": "user", "content": "..."}, or several such lists. Roles
                are system, developer, user and assistant.
            sampling_params: for all conversations, or one for each.
            use_tqdm: show progress.
            chat_template: "plain" for the bundled one, text of a Jinja template, or path of a file
                with one, in place of the model's own.
            add_generation_prompt: end the prompt with the start of the assistant's turn.
            continue_final_message: continue the last message; only without add_generation_prompt.

        Raises:
            InvalidRequestError: a message is wrong, or there is no template.
            CheckpointError: the template is not valid.
        """
        conversations = list_conversations(messages)
        params = self._each_params(sampling_params, len(conversations))
        end = prompt_end(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        prompts, params = self._render_chats(conversations, params, chat_template, end)
        outputs = self.generate(prompts, params, use_tqdm)
        decode = self.tokenizer.decode
        for output in outputs:
            output.prompt = decode(output.prompt_token_ids, skip_special_tokens=False)
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
        """Yield outputs of one conversation, as `stream` does; arguments are those of `chat`."""
        conversations = list_conversations(messages)
        if len(conversations) != 1:
            raise InvalidRequestError(
                f"there are {len(conversations)} conversations, a stream takes one; call it again",
                param="messages",
            )
        end = prompt_end(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        (prompt,), (params,) = self._render_chats(
            conversations, self._each_params(sampling_params, 1), chat_template, end
        )
        return self.stream(prompt, params)

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
        """Return the `beam_width` most probable completions of every prompt, the best first.

        A search that ends with an error has no completions, and its output has the `error`.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"params is a {type(params).__name__} but must be a BeamSearchParams"
            )
        request = GenerationRequest(prompts=list_prompts(prompts), params=params, request_id="llm")
        searches = BeamSearches(request, self.engine.input_processor)
        num_tokens = searches.num_beams * params.max_tokens
        with progress_bar(
            total=num_tokens, desc="Tokens", unit="token", is_wanted=use_tqdm
        ) as progress:
            for beams in searches.rounds(self.engine.config.max_num_seqs):
                self._calls.run(beams)
                progress.update(len(beams))
        return searches.outputs()

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
        """Return the embedding of every prompt, in their order.

        It is made of the final hidden states, after the last layer norm. An error that ends one
        request does not affect the others. Its output has the `error` and no embedding.

        Args:
            prompts: as for `generate`; each may fill the context.
            pooling: "last" for the state of the last token, "mean" for the mean of all.
            normalize: scale to length 1, so that the dot product of two vectors is their cosine.
            use_tqdm: show progress on a terminal or in a notebook.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        listed = list_prompts(prompts)
        params = PoolingParams(pooling=pooling, normalize=normalize)
        processed = self._process_each(listed, [params] * len(listed))
        self._run(processed, use_tqdm)
        return [prompt.embedding() for prompt in processed]

    def _each_params(
        self, params: SamplingParams | Iterable[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        """Return the settings of each prompt, by default the model's own; raises if closed."""
        defaults = self.default_sampling_params()
        return list_params(defaults if params is None else params, num_prompts)

    def _render_chats(
        self,
        conversations: list[list[dict[str, Any]]],
        params: list[SamplingParams],
        chat_template: str | os.PathLike[str] | None,
        end: PromptEnd,
    ) -> tuple[list[Prompt], list[SamplingParams]]:
        """Return each conversation's prompt, and its settings with the template's stop token."""
        template = self._chats.template(chat_template)
        prompts: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            with naming_prompt(index, len(conversations)):
                prompts.append(self._chats.encode(template, conversation, end))
        return prompts, [self._chats.params(template, each) for each in params]

    def _process_each(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | PoolingParams]
    ) -> list[PromptRequest]:
        """Check and tokenize every prompt under its own settings; an error names the prompt."""
        input_processor = self.engine.input_processor
        processed: list[PromptRequest] = []
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            request = GenerationRequest(prompts=[prompt], params=each, request_id="llm")
            with naming_prompt(index, len(prompts)):
                processed += input_processor.process(request)
        return processed

    def _run(self, prompts: Sequence[PromptRequest], use_tqdm: bool) -> None:
        """Run until all prompts have ended. An error of one that was refused names the prompt."""
        rates = TokenRates()
        bar = progress_bar(total=len(prompts), desc="Prompts", unit="prompt", is_wanted=use_tqdm)

        def show(stats: StepStats, num_ended: int) -> None:
            rates.add(stats)
            bar.set_postfix_str(str(rates), refresh=False)
            bar.update(num_ended)

        with bar:
            try:
                self._calls.run(prompts, None if bar.disable else show)
            except InvalidRequestError as error:
                refused = (index for index, one in enumerate(prompts) if one.error is error)
                with naming_prompt(next(refused), len(prompts)):
                    raise
