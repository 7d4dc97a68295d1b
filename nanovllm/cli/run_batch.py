"""`nanovllm run-batch`: run a file of requests in OpenAI's batch format, without a server."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nanovllm.cli.argument_types import positive, print_message
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import (
    add_engine_options,
    add_model,
    add_options,
    engine_config,
    load_chat_template,
    served_names,
)
from nanovllm.cli.parser import set_up
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.errors import counted
from nanovllm.stop_signal import StopSignal

if TYPE_CHECKING:
    from nanovllm.batch.input import BatchInput, CustomIds
    from nanovllm.batch.output import AnswerFile
    from nanovllm.engine.chat.template import ChatTemplate
    from nanovllm.engine.engine import Engine

STANDARD_STREAM = Path("-")
_DESCRIPTION = """
Run a file of requests in OpenAI's batch format, without a server.

Responses are appended in the order of completion. If interrupted, rerun the same command to resume.
A request without a seed is sampled anew in every run; with --seed, its seed is derived from that
seed and its custom_id.

  nanovllm run-batch -i requests.jsonl -o answers.jsonl --model gpt2
  nanovllm run-batch -i - -o - < requests.jsonl > answers.jsonl
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "-i FILE -o FILE [MODEL] [options]", _DESCRIPTION, ENGINE_VARIABLES)
    add_model(parser)
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"custom_id", "method", "url", "body"}; - for standard input',
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"id", "custom_id", "response", "error"}; - for standard output',
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard responses that the output file has (default: keep them and resume)",
    )
    add_options(parser, ServeOptions, ("served_model_name", "chat_template"))
    parser.add_argument(
        "--max-line-bytes",
        type=positive,
        default=4 << 20,
        metavar="BYTES",
        help="maximum length of an input line in bytes",
    )
    add_engine_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Run the requests without a response; return 0, or 128 plus the number of a signal."""
    with ended_by_interrupts():
        from nanovllm.batch.input import BatchInput
        from nanovllm.engine.engine import Engine
        from nanovllm.hub import resolve_models
    config = engine_config(parsed)
    _check_files(parsed.input, parsed.output)
    source = _shown(parsed.input, "standard input")
    target = _shown(parsed.output, "standard output")
    with _open_requests(parsed.input) as file:
        batch = BatchInput(source, file, parsed.max_line_bytes)
        ids = batch.check()
        with _open_output(parsed, ids) as output:
            answered = ids.num_taken
            if answered:
                print_message(
                    f"{target} has {answered:,} of {len(ids):,} answers; "
                    + ("nothing is left to do" if answered == len(ids) else "resuming")
                )
            if not len(ids):
                print_message(f"{source} has no requests")
            if answered == len(ids):
                return 0
            folder, config = resolve_models(parsed.model, config)
            chat_template = load_chat_template(folder, parsed.chat_template)
            runner = _Run(Engine.load(folder, config), ids, output)
            names = served_names(parsed.model, parsed.served_model_name)
            number = runner.answer_all(batch, names, chat_template)
        print_message(f"{runner.summary}; {target}")
    left = len(ids) - answered - runner.done
    if number is None or not left:
        return 0
    if parsed.output == STANDARD_STREAM:
        print_message(
            f"ended by {signal.Signals(number).name}; {counted(left, 'request')} not answered"
        )
        return 128 + number
    again = "the same command without --overwrite" if parsed.overwrite else "the same command again"
    print_message(
        f"ended by {signal.Signals(number).name}; run {again} to answer the {left:,} that are left"
    )
    return 128 + number


def _check_files(requests: Path, answers: Path) -> None:
    """Raise ValueError if the paths cannot be used as input and output."""
    has_requests = requests != STANDARD_STREAM
    if has_requests and not requests.exists():
        raise ValueError(f"{requests} does not exist; give the file of requests by -i")
    if has_requests and not requests.is_file():
        raise ValueError(
            f"{requests} is not a regular file, and the input is read twice; save it to one, "
            "or pipe it to -i -"
        )
    if answers == STANDARD_STREAM:
        return
    if not answers.parent.is_dir():
        raise ValueError(
            f"there is no folder {answers.parent} for {answers.name}; create it, "
            "or choose another output"
        )
    if has_requests and answers.exists() and answers.samefile(requests):
        raise ValueError(
            f"{requests} is the input and the output; give another file for the answers"
        )


def _shown(path: Path, stream: str) -> Path:
    """Return the path for messages."""
    return Path(stream) if path == STANDARD_STREAM else path


@contextmanager
def _open_requests(path: Path) -> Iterator[BinaryIO]:
    """Open the input; standard input is copied to a temporary file, because it is read twice."""
    if path != STANDARD_STREAM:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        yield copy


def _open_output(parsed: argparse.Namespace, ids: CustomIds) -> AbstractContextManager[AnswerFile]:
    from nanovllm.batch.output import open_answers, write_answers

    if parsed.output == STANDARD_STREAM:
        return write_answers(_shown(parsed.output, "standard output"))
    return open_answers(parsed.output, ids, overwrite=parsed.overwrite)


@dataclass(slots=True)
class _Run:
    """One run over a batch.

    Attributes:
        done: responses written.
        refused: of these, errors.
        failed: of these, faults of the engine.
        tokens: generated tokens.
    """

    engine: Engine
    ids: CustomIds
    output: AnswerFile
    done: int = 0
    refused: int = 0
    failed: int = 0
    tokens: int = 0
    duration_s: float = 0.0

    def answer_all(
        self, batch: BatchInput, model_names: tuple[str, ...], chat_template: ChatTemplate | None
    ) -> int | None:
        """Write all responses; return the number of the signal that ended the run, or None."""
        from nanovllm.batch.runner import BatchRunner
        from nanovllm.progress import progress_bar

        start_s = time.monotonic()
        bar = progress_bar(
            total=len(self.ids), initial=self.ids.num_taken, desc="Requests", unit="request"
        )
        runner = BatchRunner(self.engine, model_names, chat_template)
        with (
            StopSignal() as stop,
            bar as progress,
            closing(runner.run(batch.requests(self.ids))) as steps,
        ):
            for answers in steps:
                for answer in answers:
                    self.output.append(answer.line)
                    self.done += 1
                    self.refused += answer.status != 200
                    self.failed += answer.status == 500
                self.output.sync(only_if_due=True)
                self.tokens = runner.num_generated_tokens
                self.duration_s = time.monotonic() - start_s
                if not progress.disable:
                    progress.set_postfix_str(f"{self._tokens_per_s:.0f} tok/s", refresh=False)
                    progress.update(len(answers))
                if stop.is_requested:
                    break
        return stop.number

    @property
    def summary(self) -> str:
        """Return a line about the run."""
        errors = f", {self.refused:,} of them an error" if self.refused else ""
        failed = (
            f" ({self.failed:,} by a fault of the engine: remove their lines and run again to "
            "repeat them)"
            if self.failed
            else ""
        )
        speed = (
            f"{counted(self.tokens, 'token')} in {self.duration_s:.1f} s, "
            f"{self._tokens_per_s:.0f} tokens/s"
        )
        return f"{counted(self.done, 'request')} answered{errors}{failed}, {speed}"

    @property
    def _tokens_per_s(self) -> float:
        return self.tokens / self.duration_s if self.duration_s else 0.0
