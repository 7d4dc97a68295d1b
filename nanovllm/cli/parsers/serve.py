"""The parser of `nanovllm serve`."""

import argparse

from nanovllm.cli.argument_types import not_negative, positive, positive_number
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES, variables_help
from nanovllm.cli.options import add_chat_template, add_engine_options, add_model
from nanovllm.cli.parsers.access import add_access_options
from nanovllm.cli.parsers.parser import Command

_DESCRIPTION = "Serve a model over HTTP, with OpenAI's API, until a signal ends the server."


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="%(prog)s [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=variables_help(API_KEY_VARIABLE, *ENGINE_VARIABLES),
    )
    add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces"
    )
    group.add_argument(
        "--port", type=_port, default=8000, help="port to listen on; 0 for a free one"
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model in the API; repeat for several (default: the folder's name)",
    )
    add_chat_template(group)
    _add_limits(group)
    group.add_argument(
        "--log-level",
        choices=("error", "warning", "info", "debug"),
        default="info",
        help="least severe messages to log",
    )
    group.add_argument(
        "--log-requests",
        action="store_true",
        help="log a line of JSON about each request on standard error (default: plain lines)",
    )
    group.add_argument(
        "--log-prompts",
        action="store_true",
        help="with --log-requests: log prompts too, long ones cut (default: no)",
    )
    add_access_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=Command("nanovllm.cli.serve:run"))


def _add_limits(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-queued-requests",
        type=positive,
        default=1024,
        metavar="REQUESTS",
        help="maximum unfinished answers; more are refused",
    )
    group.add_argument(
        "--max-queued-tokens",
        type=positive,
        metavar="TOKENS",
        help="maximum total tokens (prompt + max_tokens) over all unfinished requests "
        "(default: 16 times what the KV cache holds)",
    )
    group.add_argument(
        "--max-queued-logprobs-memory",
        default="256MiB",
        metavar="MEMORY",
        help="maximum memory for log-probabilities of answers that are not sent yet",
    )
    group.add_argument(
        "--request-timeout-s",
        type=positive_number,
        metavar="SECONDS",
        help="maximum time of a request; a client can ask for less by the header "
        "x-request-timeout-s (default: no limit)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=positive,
        default=4 << 20,
        metavar="BYTES",
        help="maximum size of a request body",
    )
    group.add_argument(
        "--stalled-client-s",
        type=positive_number,
        default=60.0,
        metavar="SECONDS",
        help="close the connection of a client that sends or reads nothing for so long",
    )
    group.add_argument(
        "--shutdown-timeout-s",
        type=not_negative,
        default=10,
        metavar="SECONDS",
        help="time that running requests have to finish after a signal; 0 aborts them at once",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; it must be from 0 to 65535")
    return int(text)
