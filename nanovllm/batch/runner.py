"""Answer the requests of a batch by an engine alone; the bodies are those that the server sends.

Requests are read from the input as the engine has room for them, and all that are read run in one
batch: whenever one ends, the next one joins. So memory does not grow with the number of requests.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nanovllm.batch.input import BatchRequest
from nanovllm.batch.output import Answer
from nanovllm.engine.admission import MAX_QUEUED_REQUESTS, check_choices
from nanovllm.engine.beam_search import BeamSearches
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.step_output import StepOutput
from nanovllm.engine.update_router import UpdateRouter
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError
from nanovllm.server.http.body import check_body
from nanovllm.server.http.errors import problem_of, served_name, shorten
from nanovllm.server.http.validation_errors import quote
from nanovllm.server.openai.endpoint import Endpoint, prepare
from nanovllm.server.openai.endpoints import ENDPOINTS
from nanovllm.server.openai.renderer import Renderer
from nanovllm.server.openai.schemas import GenerationBody

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=GenerationBody)
_MAX_FAULTS = 3  # consecutive steps that may fail because of their requests

_BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}


@dataclass(slots=True, eq=False)
class _Running:
    """A request in the engine."""

    custom_id: str
    renderer: Renderer[Any, Any]
    prompts: Sequence[PromptRequest]

    @property
    def is_finished(self) -> bool:
        """Whether every prompt has ended."""
        return all(prompt.is_finished for prompt in self.prompts)


class BatchRunner:
    """Answers requests by an engine that nobody else uses.

    Attributes:
        num_generated_tokens: tokens that the answers have got so far.
    """

    def __init__(
        self, engine: Engine, model_names: Sequence[str], chat_template: ChatTemplate | None = None
    ) -> None:
        self._engine = engine
        self._model_names = model_names
        self._chat_template = chat_template
        # Those that run, and as many that replace them when they end.
        self._max_sequences = 2 * engine.config.max_num_seqs
        self._router: UpdateRouter[_Running] = UpdateRouter(engine.finish_request)
        self._faults = 0
        self.num_generated_tokens = 0

    def run(self, requests: Iterator[BatchRequest]) -> Generator[list[Answer], None, None]:
        """Answer every request; yield the answers that each step completes.

        Unfinished requests are aborted when the generator is closed. Raises EngineFaultError if
        the engine fails several times in a row.
        """
        try:
            has_more = True
            while has_more or len(self._router):
                answers: list[Answer] = []
                while (
                    has_more
                    and not self._engine.input_processor.grammars.is_full
                    and len(self._router) < self._max_sequences
                    and len(answers) < self._max_sequences
                ):
                    request = next(requests, None)
                    has_more = request is not None
                    refused = self._begin(request) if request is not None else None
                    if refused is not None:
                        answers.append(refused)
                answers += self._add_updates(self._engine.step())
                yield answers
        finally:
            for running in self._router.owners:
                for prompt in running.prompts:
                    self._router.remove(prompt)

    def _begin(self, request: BatchRequest) -> Answer | None:
        """Queue a request; return its answer if it is refused."""
        try:
            refused = self._refuse(request)
            if refused is not None:
                return refused
            seed = self._engine.config.seed
            if seed is not None:  # by id, since an interruption may change the order of requests
                self._engine.input_processor.reseed(f"{seed} {request.custom_id}")
            running = self._prepare(_BY_PATH[str(request.url)], request)
        except Exception as error:  # noqa: BLE001 - the other requests go on
            return _failed(request.custom_id, error)
        self._router.add(running.prompts, running)
        for prompt in running.prompts:
            for sequence in prompt.requests:
                self._engine.add_request(sequence)
        return None

    def _refuse(self, request: BatchRequest) -> Answer | None:
        """Return the answer to a line that a batch does not support."""
        if request.unknown:
            message = (
                f"the field {shorten(request.unknown[0])!r} is not supported; a line has "
                "custom_id, method, url and body"
            )
            return Answer.refusal(request.custom_id, "unknown_field", message)
        if request.method != "POST":
            return Answer.refusal(
                request.custom_id,
                "unsupported_method",
                f'method is {shorten(quote(request.method))} but must be "POST"',
            )
        if not isinstance(request.url, str) or request.url not in _BY_PATH:
            message = (
                f"url is {shorten(quote(request.url))}, which a batch does not answer; it answers "
                f"{', '.join(_BY_PATH)}"
            )
            return Answer.refusal(request.custom_id, "unsupported_url", message)
        return None

    def _prepare(self, endpoint: Endpoint[B], request: BatchRequest) -> _Running:
        """Check a body; raises InvalidRequestError and what `prepare` raises."""
        body = check_body(request.body, endpoint.body)
        if body.is_streamed:
            raise InvalidRequestError(
                "stream is true but a batch has whole answers only; leave it out", param="stream"
            )
        model = served_name(body.model, self._model_names)
        check_choices(body.num_choices, MAX_QUEUED_REQUESTS)
        renderer, prompts = prepare(endpoint, body, self._engine, self._chat_template, model)
        if isinstance(prompts, BeamSearches):
            raise InvalidRequestError(
                "use_beam_search is for requests to a server, not for files of requests; "
                "leave it out",
                param="use_beam_search",
            )
        return _Running(request.custom_id, renderer, prompts)

    def _add_updates(self, output: StepOutput) -> list[Answer]:
        """Add a step's updates to their requests; return the answers that they complete."""
        if output.fault is not None:
            self._faults += 1
            if self._faults == _MAX_FAULTS:
                raise EngineFaultError(
                    f"{_MAX_FAULTS} steps failed one after the other, the last with: {output.fault}"
                ) from output.fault
        elif output.stats.num_tokens:
            self._faults = 0
        changed = dict.fromkeys(running for _, running in self._router.add_updates(output))
        self.num_generated_tokens += output.stats.num_generated_tokens
        return [_complete(each) for each in changed if each.is_finished]


def _complete(running: _Running) -> Answer:
    """Return the answer to a request whose prompts have all ended."""
    try:
        body = running.renderer.body([prompt.result() for prompt in running.prompts])
        lists = {name: list(item) for name, item in body.items() if isinstance(item, Iterator)}
        return Answer.response(running.custom_id, 200, {**body, **lists})
    except Exception as error:  # noqa: BLE001 - the other requests go on
        return _failed(running.custom_id, error)


def _failed(custom_id: str, error: Exception) -> Answer:
    """Return the answer to a request that ended with this exception."""
    problem = problem_of(error)
    if not isinstance(error, NanovllmError):  # whose message does not say the reason
        logger.error("the request %r failed", custom_id, exc_info=error)
    return Answer.response(custom_id, problem.status, problem.body)
