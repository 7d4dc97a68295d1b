"""Answers to the requests of a batch, by the engine alone: the bodies are those that the server would have sent.

Requests are taken from the input only as the engine has room for them, and all that are taken run in one batch: whenever one ends, the
next one joins. So it makes no difference for memory how many there are.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nanovllm.batch.input import BatchRequest
from nanovllm.batch.output import Answer
from nanovllm.engine.admission import MAX_QUEUED_REQUESTS, check_answers
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine, StepOutput
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.output_processor import SequenceUpdate
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError
from nanovllm.server.http.body import check_body
from nanovllm.server.http.errors import error_body, problem_of, served_name, shorten
from nanovllm.server.http.problems import quote
from nanovllm.server.openai.chat import chat_body, make_chat_job
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.completions import completion_body, make_job
from nanovllm.server.openai.embeddings import EmbeddingRequest, embedding_body, prepare_requests
from nanovllm.server.openai.schemas import CompletionRequest, SamplingBody

logger = logging.getLogger(__name__)

_MAX_FAULTS = 3  # steps that fail one after the other: it is not their requests

_Job: TypeAlias = tuple[Sequence[PreparedRequest], Callable[[], Mapping[str, Any]]]
"""What an endpoint makes of a body: prepared_requests for the engine, and what gives the answer's body once they have ended."""


@dataclass(slots=True, eq=False)
class _Running:
    """A request in the engine; `unfinished` are the sequences that it still waits for."""

    custom_id: str
    prepared_requests: Sequence[PreparedRequest]
    body: Callable[[], Mapping[str, Any]]
    unfinished: set[str] = field(default_factory=set)


class BatchRunner:
    """Answers requests by an engine that nobody else uses."""

    def __init__(
        self, engine: Engine, model_names: Sequence[str], chat_template: ChatTemplate | None = None
    ) -> None:
        """Answer requests for the engine's model under any of these names; chats only with a template."""
        self._engine = engine
        self._model_names = model_names
        self._chat_template = chat_template
        self._max_sequences = (
            2 * engine.config.max_num_seqs
        )  # those that run, and as many to take the places that become free
        self._endpoints: dict[str, Callable[[object], _Job]] = {
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat,
            "/v1/embeddings": self._embedding,
        }
        self._sequences: dict[str, tuple[_Running, PreparedRequest]] = {}
        self._faults = 0

    def run(self, requests: Iterator[BatchRequest]) -> Generator[list[Answer], None, None]:
        """Answer every request; after each step, yields the answers that it completed, if any. What is unfinished when this is closed ends.

        Raises:
            EngineFaultError: the engine failed several times in a row.
        """
        try:
            has_more = True
            while has_more or self._sequences:
                answers: list[Answer] = []
                while (
                    has_more
                    and not self._engine.input_processor.grammars.is_full
                    and len(self._sequences) < self._max_sequences
                    and len(answers) < self._max_sequences
                ):
                    request = next(requests, None)
                    has_more = request is not None
                    refused = self._begin(request) if request is not None else None
                    if refused is not None:
                        answers.append(refused)
                answers += self._absorb(self._engine.step())
                yield answers
        finally:
            self._end(list(self._sequences))

    def _begin(self, request: BatchRequest) -> Answer | None:
        """Queue a request; the answer where it is refused."""
        try:
            refused = self._refuse(request)
            if refused is not None:
                return refused
            if (
                self._engine.config.seed is not None
            ):  # by its id: in an order that an interruption may change, others have drawn before it
                self._engine.input_processor.reseed(
                    f"{self._engine.config.seed} {request.custom_id}"
                )
            running = _Running(request.custom_id, *self._endpoints[str(request.url)](request.body))
        except Exception as error:  # noqa: BLE001 - the other requests go on
            return _failed(request.custom_id, error)
        for prepared in running.prepared_requests:
            for sequence in prepared.requests:
                running.unfinished.add(sequence.request_id)
                self._sequences[sequence.request_id] = running, prepared
                self._engine.add_request(sequence)
        return None

    def _refuse(self, request: BatchRequest) -> Answer | None:
        """The answer to a line that asks for something else than a batch can do."""
        if request.unknown:
            message = f"the field {shorten(request.unknown[0])!r} is not supported; a line has custom_id, method, url and body"
            return Answer.refusal(request.custom_id, "unknown_field", message)
        if request.method != "POST":
            return Answer.refusal(
                request.custom_id,
                "unsupported_method",
                f'method is {shorten(quote(request.method))} but must be "POST"',
            )
        if not isinstance(request.url, str) or request.url not in self._endpoints:
            message = f"url is {shorten(quote(request.url))}, which a batch does not answer; it answers {', '.join(self._endpoints)}"
            return Answer.refusal(request.custom_id, "unsupported_url", message)
        return None

    def _completion(self, given: object) -> _Job:
        """POST /v1/completions; raises InvalidRequestError or what `make_job` raises."""
        body = check_body(given, CompletionRequest)
        _check_whole(body)
        model = served_name(body.model, self._model_names)
        check_answers(len(body.prompts) * body.num_candidates, MAX_QUEUED_REQUESTS)
        job = make_job(body, self._engine, model)
        return job.prepared_requests, lambda: completion_body(
            job, [prepared.output_processor.output() for prepared in job.prepared_requests]
        )

    def _chat(self, given: object) -> _Job:
        """POST /v1/chat/completions; raises InvalidRequestError or what `make_chat_job` raises."""
        body = check_body(given, ChatRequest)
        _check_whole(body)
        model = served_name(body.model, self._model_names)
        job = make_chat_job(body, self._chat_template, self._engine, model)
        return [job.prepared], lambda: chat_body(job, job.prepared.output_processor.output())

    def _embedding(self, given: object) -> _Job:
        """POST /v1/embeddings; raises InvalidRequestError or what `prepare_requests` raises."""
        body = check_body(given, EmbeddingRequest)
        model = served_name(body.model, self._model_names)
        check_answers(len(body.inputs), MAX_QUEUED_REQUESTS)
        prepared_requests = prepare_requests(body, self._engine)
        return prepared_requests, lambda: embedding_body(
            prepared_requests, model, body.encoding_format
        )

    def _absorb(self, output: StepOutput) -> list[Answer]:
        """Hand a step's updates to their requests; the answers that are complete with them."""
        if output.fault is not None:
            self._faults += 1
            if self._faults == _MAX_FAULTS:
                raise EngineFaultError(
                    f"{_MAX_FAULTS} steps failed one after the other, the last with: {output.fault}"
                ) from output.fault
        elif output.stats.num_tokens:
            self._faults = 0
        answers = []
        for update in output.updates:
            if update.request_id in self._sequences:
                answer = self._take_in(update)
                if answer is not None:
                    answers.append(answer)
        return answers

    def _take_in(self, update: SequenceUpdate) -> Answer | None:
        """Hand over one update; the answer where that completes it."""
        running, prepared = self._sequences[update.request_id]
        try:
            found_stop = prepared.output_processor.add_update(update)
        except Exception:  # the other requests go on
            logger.exception("the answer to %r could not be put together", running.custom_id)
            self._end(list(running.unfinished))
            return _failed(
                running.custom_id,
                EngineFaultError("the answer could not be put together; the log has the reason"),
            )
        if found_stop:
            self._engine.finish_request(update.request_id, FinishReason.STOP)
        if found_stop or update.finish_reason is not None:
            self._end([update.request_id])
        return None if running.unfinished else _complete(running)

    def _end(self, sequence_ids: list[str]) -> None:
        """Forget sequences, and abort those that the engine has not ended itself."""
        for sequence_id in sequence_ids:
            running, _ = self._sequences.pop(sequence_id)
            running.unfinished.discard(sequence_id)
            self._engine.abort_request(sequence_id)


def _check_whole(body: SamplingBody) -> None:
    if body.stream:
        raise InvalidRequestError(
            "stream is true but a batch has whole answers only; leave it out", param="stream"
        )


def _complete(running: _Running) -> Answer:
    """The answer to a request whose sequences have all ended."""
    try:
        for prepared in running.prepared_requests:
            if prepared.output_processor.error is not None:
                raise prepared.output_processor.error
        return Answer.response(running.custom_id, 200, running.body())
    except Exception as error:  # noqa: BLE001 - the other requests go on
        return _failed(running.custom_id, error)


def _failed(custom_id: str, error: Exception) -> Answer:
    """The answer to a request that ended with this exception."""
    status, message, param = problem_of(error)
    if not isinstance(error, NanovllmError):  # whose message does not say the reason
        logger.error("the request %r failed", custom_id, exc_info=error)
    return Answer.response(custom_id, status, error_body(status, message, param))
