"""`nanovllm generate`: stream completions of one or several prompts to the terminal."""

import argparse
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import ENGINE_VARIABLES, HISTORY_VARIABLE
from nanovllm.cli.interrupts import ended_by_interrupts, ended_by_second_interrupt
from nanovllm.cli.options import (
    DEFAULT_MAX_TOKENS,
    add_learn_engine_options,
    add_model_flag,
    add_options,
    add_sampling_options,
    end_stuck_process,
    engine_config,
    engine_parts,
    learn_folder,
    load_chat_template,
    sampling_settings,
)
from nanovllm.cli.parser import set_up
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.config import BUNDLED_MODELS
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.cli.writer import Writer

_DESCRIPTION = """
Continue a prompt on the terminal. Without a prompt, read prompts from the terminal or from standard
input, one a line; on a terminal, /help lists the commands. With --chat, prompts are messages of a
conversation.

  nanovllm generate "She smiled and said"
  nanovllm generate --model gpt2 "She smiled and said"
  nanovllm generate gpt2 "She smiled and said"
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(
        parser,
        run,
        "[[MODEL] PROMPT] [options]",
        _DESCRIPTION,
        (HISTORY_VARIABLE, *ENGINE_VARIABLES),
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="PROMPT",
        help="text to continue, after the model if two are given (default: read prompts)",
    )
    add_model_flag(parser)
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--chat",
        action="store_true",
        help="answer messages by the chat template (default: no, unless --chat-template is given)",
    )
    add_options(group, ServeOptions, ("chat_template",))
    add_sampling_options(parser)
    add_learn_engine_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Complete the prompt, or each line of the input; return the exit code."""
    model, prompt = model_and_prompt(parsed)
    settings = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_settings(parsed)}
    with ended_by_interrupts():
        from nanovllm.cli.writer import ChatWriter, Writer
        from nanovllm.engine.chat.prompts import ChatPrompts
        from nanovllm.engine.engine import Engine
        from nanovllm.hub import resolve_models
    SamplingParams(**settings)  # report a wrong option before the model is loaded
    folder, config = resolve_models(model, engine_config(parsed))
    is_chat = parsed.chat or parsed.chat_template is not None
    template = load_chat_template(folder, parsed.chat_template) if is_chat else None
    if is_chat and template is None:
        raise ValueError(f"{folder.name} has no chat template; give --chat-template plain")
    learn = learn_folder(parsed)
    parts = engine_parts(learn, config, end_stuck_process)
    with nullcontext() if learn is None else ended_by_second_interrupt():
        engine = Engine.load(folder, config, parts)
        settings = {**engine.sampling_defaults, **settings}
        if template is None:
            return _answer_all(Writer(engine, settings), prompt)
        chats = ChatPrompts(folder, engine.input_processor)
        with closing(template):
            return _answer_all(ChatWriter(engine, settings, chats=chats, template=template), prompt)


def _answer_all(writer: "Writer", prompt: str | None) -> int:
    """Answer the prompt, or those of the terminal or standard input; return the exit code."""
    if prompt is not None:
        writer.answer(prompt)
        return 0
    if sys.stdin.isatty():
        from nanovllm.cli.repl import Repl

        Repl(writer).run()
        return 0
    for line in filter(None, (line.rstrip("\r\n") for line in sys.stdin)):
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
            f"{prompt} is used as the prompt; to name the model: nanovllm generate --model {prompt}"
        )
    return model, prompt


def _is_model_name(text: str) -> bool:
    from nanovllm.hub.downloads import full_name

    if text in BUNDLED_MODELS or full_name(text) != text:
        return True
    try:
        return (Path(text) / "config.json").is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False
