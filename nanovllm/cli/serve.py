"""`nanovllm serve`: run the OpenAI-compatible server."""

import argparse
from collections.abc import Mapping
from typing import Any

from nanovllm.checked_fields import checked_fields
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts, ignore_hangups
from nanovllm.cli.options import add_learn_engine_options, add_model, add_options
from nanovllm.cli.parser import CommandParser, set_up
from nanovllm.cli.serve_options import ServeOptions

_DESCRIPTION = "Serve a model over HTTP with an OpenAI-compatible API until a signal arrives."
_GROUPS = {"host": "server", "inspector": "inspector", "api_key": "security"}
"""The titles of the groups of options by their first field; fields before it have no option."""


def run(parsed: argparse.Namespace) -> int:
    """Serve until a signal arrives; return 1 if the model or the port cannot be used."""
    ignore_hangups()
    with ended_by_interrupts():
        from nanovllm.cli.serving import serve
    return serve(ServeOptions.of(parsed))


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "[MODEL] [options]", _DESCRIPTION, (API_KEY_VARIABLE, *ENGINE_VARIABLES))
    add_model(parser)
    group = None
    for name in checked_fields(ServeOptions):
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        if group is not None:
            add_options(group, ServeOptions, (name,))
    add_learn_engine_options(parser)


def options_from(settings: Mapping[str, Any]) -> ServeOptions:
    """Return the options with values of a configuration file, by name; raises ValueError."""
    parser = CommandParser(prog="nanovllm serve")
    define(parser)
    return ServeOptions.of(parser.parse_settings(settings))
