"""ServeOptions: the options of `nanovllm serve`, and of a replica under Ray Serve."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from nanovllm.cli.options import engine_config, learn_folder, options_of
from nanovllm.config import BUNDLED_MODEL, EngineConfig, Positive, SchedulingPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of a server.

    Attributes:
        model: folder or name.
        engine: the engine's settings.
        learn_folder: folder of a reader of the course, whose code the engine runs; None for none.
        scheduling_policy: that of the engine; None if it is left to the server.
        host: address to listen on; 0.0.0.0 for all interfaces.
        port: port to listen on; 0 for a free one.
        served_model_name: name of the model in requests; repeat for several; None for the folder's
            name.
        chat_template: file of a Jinja chat template, or plain for the bundled one; None for the
            model's own.
        response_store: keep the newest responses of /v1/responses in memory, for
            previous_response_id and item_reference.
        max_queued_requests: maximum unfinished choices of a client (API key or address); all
            clients may have 1.25 times this and the next two.
        max_queued_tokens: maximum total tokens (prompt + max_tokens) over all unfinished requests
            of a client; None for 16 times the KV cache.
        max_queued_logprobs_memory: maximum memory for a client's log-probabilities that are not
            sent yet.
        request_timeout_s: timeout of a request in seconds; the header x-request-timeout-s can lower
            it; None for no limit.
        max_body_bytes: maximum size of a request body in bytes.
        stalled_client_s: close a connection whose client sends or reads nothing for this many
            seconds.
        keep_alive_s: send a blank line to a stream after this many seconds without an event, for
            proxies that close idle connections; None for never.
        drain_delay_s: seconds after a signal in which /health is 503 but requests are served, so
            that load balancers go elsewhere.
        shutdown_timeout_s: seconds for running requests to finish after that; 0 aborts them at
            once.
        log_level: minimum severity of log messages.
        log_requests: log each request as a line of JSON on standard output, which then has no other
            lines (default: uvicorn's access log).
        log_prompts: with --log-requests: log prompts too, truncated.
        inspector: serve the inspector: the page / and the endpoints under /v1/engine and
            /v1/inspect.
        inspector_shows_prompts: include the prompts of all clients, truncated.
        inspector_controls: allow all clients to pause and step the engine; None for only on a
            loopback address without API keys.
        api_key: accepted bearer token, visible to other users of the machine; repeat for several;
            None for NANOVLLM_API_KEY.
        api_key_file: file with one key a line; lines that begin with # are ignored; None for
            NANOVLLM_API_KEY.
        allowed_hosts: accepted Host header besides IP addresses and localhost; * for any;
            repeatable; None for any with keys or off loopback.
        allowed_origins: CORS origin such as https://example.org, or a JSON list of them; * for all;
            repeatable; None for none.
        ssl_certfile: TLS certificate in PEM format; None for none, plain HTTP.
        ssl_keyfile: private key in PEM format; None for in the certificate file.
    """

    model: str = BUNDLED_MODEL
    engine: EngineConfig = field(default_factory=EngineConfig)
    learn_folder: Path | None = None
    scheduling_policy: SchedulingPolicy | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    served_model_name: list[str] | None = None
    chat_template: str | None = None
    response_store: bool = True
    max_queued_requests: Positive = 1024
    max_queued_tokens: Positive | None = None
    max_queued_logprobs_memory: str = "256MiB"
    request_timeout_s: Annotated[float, Interval(gt=0)] | None = None
    max_body_bytes: Positive = 4 << 20
    stalled_client_s: Annotated[float, Interval(gt=0)] = 60.0
    keep_alive_s: Annotated[float, Interval(ge=0.1, le=86_400)] | None = None
    drain_delay_s: Annotated[int, Interval(ge=0)] = 0
    shutdown_timeout_s: Annotated[int, Interval(ge=0)] = 10
    log_level: Literal["error", "warning", "info", "debug"] = "info"
    log_requests: bool = False
    log_prompts: bool = False
    inspector: bool = True
    inspector_shows_prompts: bool = False
    inspector_controls: bool | None = None
    api_key: list[str] | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    allowed_hosts: list[str] | None = None
    allowed_origins: list[str] | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> "ServeOptions":
        """Return the options of a command line; raises ValueError for those of the engine."""
        return options_of(
            parsed, cls, engine=engine_config(parsed), learn_folder=learn_folder(parsed)
        )
