"""The options that say who may use a server: API keys, hosts, origins, certificate."""

import argparse
from pathlib import Path

from nanovllm.cli.environment import API_KEY_VARIABLE


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Add options for keys, hosts, origins and TLS."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        help="key that clients send as a bearer token; repeat for several keys; other users of the "
        f"machine can see it, so prefer {API_KEY_VARIABLE} or a file "
        f"(default: the keys in {API_KEY_VARIABLE}, or no key)",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one key a line; lines that begin with # are ignored; with it or --api-key "
        f"{API_KEY_VARIABLE} is not read (default: no file)",
    )
    group.add_argument(
        "--allowed-hosts",
        action="append",
        metavar="NAME",
        help="host name that requests may be for, beside addresses and localhost; * for any; "
        "repeat for several (default: any, but none on a loopback address without keys)",
    )
    group.add_argument(
        "--allowed-origins",
        action="append",
        metavar="ORIGIN",
        help="web page whose scripts may use the server, such as https://example.org; * for all; "
        "repeat for several, or give a JSON list (default: none)",
    )
    group.add_argument(
        "--ssl-certfile",
        type=Path,
        metavar="FILE",
        help="certificate in PEM format: serve https (default: none, http)",
    )
    group.add_argument(
        "--ssl-keyfile",
        type=Path,
        metavar="FILE",
        help="private key in PEM format (default: in the file of the certificate)",
    )
