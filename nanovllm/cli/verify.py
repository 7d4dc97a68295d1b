"""`nanovllm verify`: compare a checkpoint with transformers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import (
    add_engine_options,
    add_model,
    add_options,
    engine_config,
    options_of,
)
from nanovllm.cli.parser import set_up
from nanovllm.cli.table import print_table
from nanovllm.config import Positive
from nanovllm.errors import EngineFaultError, NanovllmError, counted

if TYPE_CHECKING:
    from nanovllm.cli.verify_comparison import Bound, Comparison
    from nanovllm.cli.verify_reference import Reference

AGREES, DIFFERS, NOT_COMPARED = 0, 1, 2
"""Exit codes."""
_COMMAND = "nanovllm verify"
_DESCRIPTION = f"""
Compare a checkpoint's log-probabilities, greedy tokens and tokenization with an installed
transformers.

The reference runs in float32 with eager attention. Greedy tokens must be equal up to the first step
where its top two tokens are closer than twice the tolerance (0.1 in bfloat16, 0.5 in int8): from
there on either token is right, and the texts may diverge.

exit codes: {AGREES} everything agrees; {DIFFERS} something differs; {NOT_COMPARED} nothing was
compared, because torch or transformers is missing, or the model cannot be loaded.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The options of the comparison.

    Attributes:
        prompts: text file with one prompt a line; None for built-in prompts.
        max_tokens: greedy tokens to compare for each prompt.
        tolerance: maximum difference of log-probabilities; None for float32 1e-4; bfloat16 and int8
            mean KL of 5e-4 and 5e-3 nats.
    """

    prompts: Path | None = None
    max_tokens: Positive = 32
    tolerance: Annotated[float, Interval(gt=0)] | None = None


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "[MODEL] [options]", _DESCRIPTION, ENGINE_VARIABLES)
    add_model(parser)
    add_options(parser.add_argument_group("comparison"), VerifyOptions)
    add_engine_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Compare and report; return an exit code."""
    options = options_of(parsed, VerifyOptions)
    try:
        with ended_by_interrupts():
            from nanovllm.cli.verify_comparison import Bound, compare, read_prompts
            from nanovllm.cli.verify_reference import Reference, import_libraries
            from nanovllm.hub import resolve_model
            from nanovllm.llm import LLM
        libraries = import_libraries()  # before a model is downloaded in vain
        config = engine_config(parsed)
        folder = resolve_model(parsed.model)
        reference = Reference(folder, libraries)
        llm = LLM(folder, **asdict(config))
        prompts = read_prompts(llm, options.prompts, options.max_tokens)
        bound = Bound.of(llm.engine.config, options.tolerance)
        comparisons = compare(
            llm, reference, prompts, max_tokens=options.max_tokens, close=bound.close
        )
    except ImportError as error:
        print_message(
            f"the comparison needs torch and transformers ({error}): "
            "pip install transformers, and torch for CPUs: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu",
            _COMMAND,
        )
        return NOT_COMPARED
    except EngineFaultError as error:
        print_message(f"{parsed.model} cannot be computed: {error}", _COMMAND)
        return DIFFERS
    except (NanovllmError, ValueError, OSError, RuntimeError) as error:
        print_message(str(error), _COMMAND)
        return NOT_COMPARED
    return _report(parsed, reference, comparisons, bound)


def _report(
    parsed: argparse.Namespace, reference: Reference, comparisons: list[Comparison], bound: Bound
) -> int:
    """Print a table, the verdict and a line of JSON; return the exit code."""
    rows = [
        ("prompt", "tokens", "tokenized", "log-probs, all", "log-probs, prompt", "KL", "greedy"),
        *map(_row, comparisons),
    ]
    print(f"{parsed.model} against {reference.title}, float32\n")
    print_table(rows)
    if reference.tokenizer_problem is not None:
        print(
            "\nTokenization was not compared, since transformers cannot load the tokenizer: "
            f"{reference.tokenizer_problem}"
        )
    different = [one.prompt for one in comparisons if not one.agrees(bound)]
    verdict = (
        f"DIFFERENT in {len(different)} of {counted(len(comparisons), 'prompt')}: "
        f"{', '.join(different)}"
        if different
        else f"Agreement in all of {counted(len(comparisons), 'prompt')}"
    )
    print(f"\n{verdict} ({bound}).\n")
    record = {
        "command": "verify", "model": parsed.model, "agrees": not different,
        "tolerance": bound.tolerance, "max_divergence": bound.divergence,
        "max_tokens": parsed.max_tokens,
        "max_logprob_difference": _worst([one.logprob_difference for one in comparisons]),
        "max_target_difference": _worst([one.target_difference for one in comparisons]),
        "tokenizer_problem": reference.tokenizer_problem, "versions": reference.versions,
        "prompts": [{**asdict(one), "agrees": one.agrees(bound)} for one in comparisons],
    }  # fmt: skip
    print(json.dumps(record, allow_nan=False), flush=True)
    return DIFFERS if different else AGREES


def _row(comparison: Comparison) -> tuple[str, ...]:
    tokens = (
        str(comparison.tokens)
        if comparison.tokens == comparison.tokens_of_prompt
        else f"{comparison.tokens} of {comparison.tokens_of_prompt}"
    )
    tokenized = {True: "alike", False: "DIFFERENT", None: "-"}[comparison.is_tokenized_alike]
    values = comparison.logprob_difference, comparison.target_difference, comparison.divergence
    everywhere, prompt, divergence = (
        "not finite" if value is None else f"{value:.1e}" for value in values
    )
    return (
        comparison.prompt,
        tokens,
        tokenized,
        everywhere,
        prompt if comparison.tokens > 1 else "-",
        divergence,
        _greedy_text(comparison),
    )


def _greedy_text(comparison: Comparison) -> str:
    if comparison.gap_where_different is None:
        return f"all {comparison.greedy_tokens} equal"
    apart = f"where the reference's two best are {comparison.gap_where_different:.1e} apart"
    if comparison.is_greedy_right:
        close = (
            ""
            if comparison.first_close_step == comparison.greedy_equal
            else f"; its choice at step {comparison.first_close_step} was close already"
        )
        return f"equal up to step {comparison.greedy_equal}, {apart}{close}"
    return f"DIFFERENT at step {comparison.greedy_equal}, {apart}"


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
