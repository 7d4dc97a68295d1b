"""nanovllm generate "Once upon a time": stream an answer to the terminal; without a prompt, one after the other from what is typed."""

import argparse
import sys
from collections.abc import Generator, Iterator
from contextlib import closing

from nanovllm.cli.options import (
    add_engine_options,
    add_sampling_options,
    engine_config,
    sampling_settings,
)
from nanovllm.engine.engine import Engine
from nanovllm.engine.intake import sampling_defaults
from nanovllm.errors import EngineFaultError, InvalidRequestError
from nanovllm.hub import BUNDLED_MODEL, resolve_model
from nanovllm.sampling_params import SamplingParams

_DEFAULT_MAX_TOKENS = 128


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        "generate", help="answer a prompt on the terminal", description=__doc__
    )
    parser.add_argument("prompt", nargs="?", help="left out: read prompts line by line")
    parser.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        help=f"a folder, or a name such as gpt2 or any/repo (default: the bundled {BUNDLED_MODEL})",
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Answer the prompt, or each line of the input."""
    settings = {"max_tokens": _DEFAULT_MAX_TOKENS, **sampling_settings(parsed)}
    SamplingParams(**settings)  # a wrong flag is told before the model is loaded
    engine = Engine.load(resolve_model(parsed.model), engine_config(parsed))
    params = SamplingParams(**{**sampling_defaults(engine.generation_config), **settings})
    if parsed.prompt is not None:
        _answer(engine, parsed.prompt, params)
        return 0
    for line in _lines():
        try:
            _answer(engine, line, params)
        except InvalidRequestError as error:
            print(f"{error}", file=sys.stderr)
        except KeyboardInterrupt:  # stops this answer, not the program
            print()
    return 0


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the input ends."""
    if sys.stdin.isatty():
        print("Type the beginning of a text. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _answer(engine: Engine, prompt: str, params: SamplingParams) -> None:
    """Print the prompt and its answer as it grows."""
    with closing(stream(engine, prompt, params)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def stream(engine: Engine, prompt: str, params: SamplingParams) -> Generator[str, None, None]:
    """The pieces of the text to show, the prompt first. Closing the iterator ends the request."""
    submission = engine.intake.submit("generate", prompt, params)
    yield prompt
    with closing(engine.run([submission])) as steps:
        for _ in steps:
            news = submission.assembler.take_news()
            if news is not None and news.outputs[0].text:
                yield news.outputs[0].text
    if submission.assembler.error is not None:
        raise EngineFaultError(submission.assembler.error)
