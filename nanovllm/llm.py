"""LLM: offline batched inference in three lines, with vLLM's names and shapes."""

import os
from collections.abc import Callable, Mapping, Sequence

from nanovllm.config import EngineConfig
from nanovllm.engine.beam_search import BeamSearchParams, begin_searches, only_position
from nanovllm.engine.call_runner import CallRunner
from nanovllm.engine.engine import Engine
from nanovllm.engine.intake import Prompt, Submission, naming_prompt, sampling_defaults
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.request import Pooling
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.hub import BUNDLED_MODEL, resolve_model
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput
from nanovllm.progress import progress_bar
from nanovllm.sampling_params import SamplingParams


class LLM:
    """A model ready to generate.

    It may be used from any number of threads, and by `asyncio.to_thread`: calls that are made at the
    same time are answered in one batch, each with its own outputs.

    >>> llm = LLM("gpt2")
    >>> llm.generate("Once upon a time", SamplingParams(temperature=0.8, top_p=0.95))[0].outputs[0].text
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = BUNDLED_MODEL,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        backend: str = "numba",
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
        scheduling_policy: str = "fcfs",
    ) -> None:
        """Load a model by folder, by name ("gpt2", "any/repo"), or the bundled one; EngineConfig says what each setting does.

        Raises:
            ModelNotFoundError: the name leads nowhere. CheckpointError: the folder cannot be used. ValueError: a setting is wrong.
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
        self.engine = Engine.load(resolve_model(model), config)
        self._calls = CallRunner(self.engine)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """Settings for when a call gives none: those of the model's generation_config.json, otherwise SamplingParams's own."""
        return SamplingParams(**sampling_defaults(self.engine.generation_config))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs come in the order of the prompts.

        An error that ends one answer is told by its output, whose `error` says why and whose
        `finish_reason` is "error"; the others are not affected.

        Args:
            prompts: one or several of: text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of token ids.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show prompts done, prefill and decode tokens per second, on a terminal.

        Raises:
            InvalidRequestError: a prompt or its settings are wrong; nothing was run.
        """
        submissions = self._submissions(prompts, sampling_params)
        self._run(submissions, use_tqdm)
        return [submission.assembler.output() for submission in submissions]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """The most probable answers to every prompt, `beam_width` each, the best first; their cumulative_logprob is the whole answer's.

        A search that ends with an error has no answers, and its output's `error` says why.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"params is a {type(params).__name__} but must be a BeamSearchParams"
            )
        intake = self.engine.intake
        searches = begin_searches(_as_prompts(prompts), params, intake)
        with progress_bar(
            is_wanted=use_tqdm, total=params.max_tokens, desc="Tokens", unit="token"
        ) as progress:
            while going := [search for search in searches if not search.is_finished]:
                asked = [
                    [
                        intake.submit(intake.new_request_id("beam"), ids, params.step_params)
                        for ids in search.prompts()
                    ]
                    for search in going
                ]
                self._run([submission for beams in asked for submission in beams], use_tqdm=False)
                for search, beams in zip(going, asked, strict=True):
                    outputs = [submission.assembler.output() for submission in beams]
                    error = next((one.error for one in outputs if one.error is not None), None)
                    if error is not None:
                        search.fail(error)
                    else:
                        search.take([only_position(output) for output in outputs])
                progress.update()
        return [
            search.output(intake.new_request_id("llm"), self.tokenizer, params.beam_width)
            for search in searches
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Turn every prompt into a vector: the final hidden state of its tokens, after the last layer norm; in the order of the prompts.

        An error that ends one prompt is told by its output, whose `error` says why and whose
        embedding is empty; the others are not affected.

        Args:
            prompts: as for `generate`; each may fill the context.
            pooling: "last" for the state of the last token, "mean" for the mean of all.
            normalize: scale to length 1, so that the product of two vectors is their cosine.
            use_tqdm: show progress on a terminal.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong; nothing was run.
        """
        listed = _as_prompts(prompts)

        def submit(index: int, request_id: str) -> Submission:
            return self.engine.intake.embed(
                request_id, listed[index], pooling=pooling, normalize=normalize
            )

        submissions = self._submit_each(len(listed), submit)
        self._run(submissions, use_tqdm)
        return [submission.assembler.embedding_or_error() for submission in submissions]

    def _submissions(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Submission]:
        listed = _as_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.default_sampling_params()
        params = _as_params(sampling_params, len(listed))

        def submit(index: int, request_id: str) -> Submission:
            submission = self.engine.intake.submit(request_id, listed[index], params[index])
            if submission.grammar is not None:
                submission.grammar.wait()
            return submission

        return self._submit_each(len(listed), submit)

    def _submit_each(
        self, count: int, submit: Callable[[int, str], Submission]
    ) -> list[Submission]:
        """`submit(index, request_id)` for every prompt; of several, an error names the one at fault."""
        submissions = []
        for index in range(count):
            with naming_prompt(index, count):
                submissions.append(submit(index, self.engine.intake.new_request_id("llm")))
        return submissions

    def _run(self, submissions: Sequence[Submission], use_tqdm: bool) -> None:
        """Work until every submission has ended."""
        rates = _Rates()
        bar = progress_bar(
            is_wanted=use_tqdm, total=len(submissions), desc="Prompts", unit="prompt"
        )

        def show(stats: StepStats, num_ended: int) -> None:
            rates.add(stats)
            bar.set_postfix_str(str(rates), refresh=False)
            bar.update(num_ended)

        with bar:
            self._calls.run(submissions, None if bar.disable else show)


class _Rates:
    """Prefill and decode tokens per second; the time of a step that did both is divided by tokens."""

    def __init__(self) -> None:
        self._prompt_tokens = self._decode_tokens = 0
        self._prompt_s = self._decode_s = 0.0

    def add(self, stats: StepStats) -> None:
        if stats.num_tokens:
            self._prompt_tokens += stats.num_prompt_tokens
            self._decode_tokens += stats.num_decode_tokens
            self._prompt_s += stats.duration_s * stats.num_prompt_tokens / stats.num_tokens
            self._decode_s += stats.duration_s * stats.num_decode_tokens / stats.num_tokens

    def __str__(self) -> str:
        prefill = self._prompt_tokens / self._prompt_s if self._prompt_s else 0.0
        decode = self._decode_tokens / self._decode_s if self._decode_s else 0.0
        return f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"


def _as_params(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(
        isinstance(one, SamplingParams) for one in params
    ):
        raise InvalidRequestError(
            f"sampling_params is a {type(params).__name__} but must be a SamplingParams, or a list of them"
        )
    if len(params) != count:
        raise InvalidRequestError(
            f"there are {count} prompts but {len(params)} sampling_params; give one for all, or one for each"
        )
    return list(params)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, Sequence) and prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            f"prompts is a {type(prompts).__name__} but must be a prompt or a list of prompts",
            param="prompt",
        )
    return list(prompts)  # type: ignore[arg-type]
