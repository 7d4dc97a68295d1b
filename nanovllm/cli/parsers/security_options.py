"""Options for access to a server: API keys, hosts, origins and TLS."""

import argparse
from pathlib import Path

from nanovllm.cli.environment import API_KEY_VARIABLE


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """Add options for keys, hosts, origins and TLS."""
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
