"""`nanovllm serve`: run the OpenAI-compatible server."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import (
    bounded_number,
    not_negative,
    port_number,
    positive,
    positive_number,
)
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts, ignore_hangups
from nanovllm.cli.options import (
    add_chat_template,
    add_engine_options,
    add_model,
    add_served_model_name,
)
from nanovllm.cli.parser import CommandParser, set_up

_DESCRIPTION = "Serve a model over HTTP with an OpenAI-compatible API until a signal arrives."


def run(parsed: argparse.Namespace) -> int:
    """Serve until a signal arrives; return 1 if the model or the port cannot be used."""
    ignore_hangups()
    with ended_by_interrupts():
        from nanovllm.cli.serving import serve
    return serve(parsed)


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(
        parser,
        run,
        arguments="[MODEL] [options]",
        description=_DESCRIPTION,
        variables=(API_KEY_VARIABLE, *ENGINE_VARIABLES),
    )
    add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces"
    )
    group.add_argument(
        "--port", type=port_number, default=8000, help="port to listen on; 0 for a free one"
    )
    add_served_model_name(group)
    add_chat_template(group)
    group.add_argument(
        "--response-store",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the newest responses of /v1/responses in memory, for previous_response_id and "
        "item_reference",
    )
    _add_limits(group)
    group.add_argument(
        "--log-level",
        choices=("error", "warning", "info", "debug"),
        default="info",
        help="minimum severity of log messages",
    )
    group.add_argument(
        "--log-requests",
        action="store_true",
        help="log each request as a line of JSON on standard output, which then has no other lines "
        "(default: uvicorn's access log)",
    )
    group.add_argument(
        "--log-prompts",
        action="store_true",
        help="with --log-requests: log prompts too, truncated (default: no)",
    )
    _add_inspector(parser)
    _add_security_options(parser)
    add_engine_options(parser)


def options_from(settings: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options with values of a configuration file, by name; raises ValueError."""
    parser = CommandParser(prog="nanovllm serve")
    define(parser)
    return parser.parse_settings(settings)


def _add_limits(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-queued-requests",
        type=positive,
        default=1024,
        metavar="REQUESTS",
        help="maximum unfinished choices of a client (API key or address); all clients may have "
        "1.25 times this and the next two",
    )
    group.add_argument(
        "--max-queued-tokens",
        type=positive,
        metavar="TOKENS",
        help="maximum total tokens (prompt + max_tokens) over all unfinished requests of a client "
        "(default: 16 times the KV cache)",
    )
    group.add_argument(
        "--max-queued-logprobs-memory",
        default="256MiB",
        metavar="MEMORY",
        help="maximum memory for a client's log-probabilities that are not sent yet",
    )
    group.add_argument(
        "--request-timeout-s",
        type=positive_number,
        metavar="SECONDS",
        help="timeout of a request in seconds; the header x-request-timeout-s can lower it "
        "(default: no limit)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=positive,
        default=4 << 20,
        metavar="BYTES",
        help="maximum size of a request body in bytes",
    )
    group.add_argument(
        "--stalled-client-s",
        type=positive_number,
        default=60.0,
        metavar="SECONDS",
        help="close a connection whose client sends or reads nothing for this many seconds",
    )
    group.add_argument(
        "--keep-alive-s",
        type=bounded_number(0.1, 86_400),
        metavar="SECONDS",
        help="send a blank line to a stream after this many seconds without an event, for proxies "
        "that close idle connections (default: never)",
    )
    group.add_argument(
        "--drain-delay-s",
        type=not_negative,
        default=0,
        metavar="SECONDS",
        help="seconds after a signal in which /health is 503 but requests are served, so that load "
        "balancers go elsewhere",
    )
    group.add_argument(
        "--shutdown-timeout-s",
        type=not_negative,
        default=10,
        metavar="SECONDS",
        help="seconds for running requests to finish after that; 0 aborts them at once",
    )


def _add_inspector(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inspector")
    group.add_argument(
        "--inspector",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve the inspector: the page / and the endpoints under /v1/engine and /v1/inspect",
    )
    group.add_argument(
        "--inspector-shows-prompts",
        action="store_true",
        help="include the prompts of all clients, truncated (default: no)",
    )
    group.add_argument(
        "--inspector-controls",
        action=argparse.BooleanOptionalAction,
        help="allow all clients to pause and step the engine (default: only on a loopback address "
        "without API keys)",
    )


def _add_security_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    group.add_argument(
        "--api-key",
        action="append",
        help="accepted bearer token, visible to other users of the machine; repeat for several "
        f"(default: {API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one key a line; lines that begin with # are ignored "
        f"(default: {API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--allowed-hosts",
        action="append",
        metavar="NAME",
        help="accepted Host header besides IP addresses and localhost; * for any; repeatable "
        "(default: any with keys or off loopback)",
    )
    group.add_argument(
        "--allowed-origins",
        action="append",
        metavar="ORIGIN",
        help="CORS origin such as https://example.org, or a JSON list of them; * for all; "
        "repeatable (default: none)",
    )
    group.add_argument(
        "--ssl-certfile",
        type=Path,
        metavar="FILE",
        help="TLS certificate in PEM format (default: none, plain HTTP)",
    )
    group.add_argument(
        "--ssl-keyfile",
        type=Path,
        metavar="FILE",
        help="private key in PEM format (default: in the certificate file)",
    )
