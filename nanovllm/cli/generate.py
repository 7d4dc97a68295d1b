"""`nanovllm generate`: stream completions of one or several prompts to the terminal."""

import argparse
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.options import DEFAULT_MAX_TOKENS, engine_config, sampling_settings
from nanovllm.cli.repl import Repl, read_lines_of
from nanovllm.config import BUNDLED_MODELS
from nanovllm.engine.engine import Engine
from nanovllm.errors import EngineFaultError, InvalidRequestError
from nanovllm.hub import resolve_model
from nanovllm.hub.downloads import full_name
from nanovllm.sampling_params import SamplingParams


def run(parsed: argparse.Namespace) -> int:
    """Complete the prompt, or each line of the input; return the exit code."""
    model, prompt = model_and_prompt(parsed)
    settings = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_settings(parsed)}
    SamplingParams(**settings)  # report a wrong option before the model is loaded
    engine = Engine.load(resolve_model(model), engine_config(parsed))
    writer = Writer(engine, {**engine.sampling_defaults, **settings})
    if prompt is not None:
        writer.answer(prompt)
        return 0
    if sys.stdin.isatty():
        Repl(writer).run()
        return 0
    for line in read_lines_of(sys.stdin):
        try:
            writer.answer(line)
        except InvalidRequestError as error:
            print(f"{error}", file=sys.stderr)
        except KeyboardInterrupt:  # stops this completion, not the program
            print()
    return 0


def model_and_prompt(parsed: argparse.Namespace) -> tuple[str, str | None]:
    """Return the arguments' model and prompt, which may be None; raises ValueError for two of one.

    A single argument is the prompt even if it names a model, so that text of any origin never loads
    a model; a message says so.
    """
    texts, model = list(parsed.texts), str(parsed.model)
    if len(texts) > 2 or (len(texts) == 2 and hasattr(parsed, "named_model")):
        raise ValueError(
            f"generate takes one prompt but {len(texts)} are given; "
            "put a prompt with spaces in quotes"
        )
    if len(texts) == 2:
        model = texts.pop(0)
    prompt = texts[0] if texts else None
    if prompt is not None and len(parsed.texts) == 1 and _is_model_name(prompt):
        print_message(
            f"{prompt} is taken as the prompt; for the model: nanovllm generate --model {prompt}"
        )
    return model, prompt


def _is_model_name(text: str) -> bool:
    if text in BUNDLED_MODELS or full_name(text) != text:
        return True
    try:
        return (Path(text) / "config.json").is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


@dataclass(slots=True)
class Writer:
    """Prints completions on standard output; `settings` of the sampler may change between them.

    Attributes:
        num_tokens: generated tokens of the last completion.
        duration_s: time that it took.
    """

    engine: Engine
    settings: dict[str, Any]
    num_tokens: int = 0
    duration_s: float = 0.0

    def answer(self, prompt: str) -> None:
        """Stream the prompt and its completion."""
        params = SamplingParams(**self.settings)
        start_s, before = time.perf_counter(), self.engine.stats().generation_tokens
        try:
            with closing(stream(self.engine, prompt, params)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
            print()
        finally:
            self.num_tokens = self.engine.stats().generation_tokens - before
            self.duration_s = time.perf_counter() - start_s


def stream(engine: Engine, prompt: str, params: SamplingParams) -> Generator[str, None, None]:
    """Yield the prompt and the pieces of its completion; closing aborts the request."""
    prepared = engine.input_processor.submit("generate", prompt, params)
    yield prompt
    with closing(engine.run([prepared])) as steps:
        for _ in steps:
            delta = prepared.output_processor.take_delta()
            if delta is not None and delta.outputs[0].text:
                yield delta.outputs[0].text
    if prepared.output_processor.error is not None:
        raise EngineFaultError(prepared.output_processor.error)
