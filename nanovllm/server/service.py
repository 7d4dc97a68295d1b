"""What the routes of one server share: its settings, its engine and what its operator changes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.server.http.auth import ApiKeys
from nanovllm.server.http.worker_pools import WorkerPools
from nanovllm.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the application.

    Attributes:
        model_names: names that requests may use for the model; responses have the first by default.
        api_keys: clients must send one of them as a bearer token; empty for no check.
        allowed_hosts: accepted host names, beside addresses and localhost; None for any.
        allowed_origins: origins of web pages whose scripts may use the server, or `*` for all.
        max_body_bytes: largest request body.
        stalled_client_s: time after which a client that stops reading its response, or sending its
            request, is disconnected.
        keep_alive_s: time after which a stream without an event sends blank lines; None for never.
        request_timeout_s: maximum time from a request's arrival to the end of its response; None
            for no limit.
        chat_template: renders messages as a prompt; without one, chats are refused.
        has_response_store: keep the responses of /v1/responses for later requests.
        log_requests: log a line of JSON about each request to the logger `nanovllm.requests`.
        log_prompts: include prompts in these lines.
        has_inspector: serve the inspector's page at `/`, and its endpoints.
        inspected_folder: the model's folder, for /v1/inspect; None to leave these routes out.
        inspector_shows_prompts: include prompts in the state of the engine.
        inspector_controls: allow all clients, with a key where there are some, to pause and step
            the engine.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    stalled_client_s: float = 60.0
    keep_alive_s: float | None = None
    request_timeout_s: float | None = None
    chat_template: ChatTemplate | None = None
    has_response_store: bool = True
    log_requests: bool = False
    log_prompts: bool = False
    inspected_folder: Path | None = None
    has_inspector: bool = True
    inspector_shows_prompts: bool = False
    inspector_controls: bool = False


class ServerControl:
    """What the operator of a server asks and changes while it runs.

    Attributes:
        api_keys: the accepted keys; a server that started without keys checks none.
        work: the worker threads, which end with the engine.
        is_draining: /health answers 503 although requests are served, because the server is about
            to stop and load balancers should send their requests elsewhere.
    """

    def __init__(self, engine: AsyncEngine, api_keys: Iterable[str] = ()) -> None:
        self.api_keys = ApiKeys(api_keys)
        self.work = WorkerPools(engine.timeout_error)
        self.is_draining = False
        engine.when_stopped(self.work.close)


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one server."""

    engine: AsyncEngine
    settings: ServerSettings
    metrics: ServerMetrics
    control: ServerControl

    @property
    def work(self) -> WorkerPools:
        """The worker threads."""
        return self.control.work
