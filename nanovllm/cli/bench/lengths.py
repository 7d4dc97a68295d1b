"""Lengths of prompts and outputs that fit the context of a model."""

from nanovllm.cli.argument_types import print_message
from nanovllm.errors import ContextLengthError, counted


def fit_lengths(
    input_len: int | None,
    output_len: int | None,
    defaults: tuple[int, int],
    max_model_len: int | None,
) -> tuple[int, int]:
    """Return the tokens of a prompt and of its output.

    Lengths that are None have their defaults, shortened to the context; a message says so.

    Args:
        input_len: tokens of the prompt; None for the default.
        output_len: tokens of the output; None for the default.
        defaults: the two defaults.
        max_model_len: tokens of the context; None where it is not known.

    Raises:
        ContextLengthError: the lengths that are not None do not fit.
    """
    wanted_input = defaults[0] if input_len is None else input_len
    wanted_output = defaults[1] if output_len is None else output_len
    if max_model_len is None or wanted_input + wanted_output <= max_model_len:
        return wanted_input, wanted_output
    if output_len is not None:
        room = max_model_len - output_len
    else:  # the prompt has its default share of the context, or its own length
        room = max_model_len * wanted_input // (wanted_input + wanted_output)
    fitting_input = input_len or max(1, room)
    fitting_output = output_len or max(1, max_model_len - fitting_input)
    check_fits("a prompt", fitting_input, fitting_output, max_model_len)
    if (fitting_input, fitting_output) != (wanted_input, wanted_output):
        print_message(
            f"lengths shortened to the context of {max_model_len:,} tokens: {fitting_input:,} for "
            f"a prompt, {fitting_output:,} for its output"
        )
    return fitting_input, fitting_output


def check_fits(name: str, input_len: int, output_len: int, max_model_len: int) -> None:
    """Raise ContextLengthError unless a prompt and its output fit the context."""
    if input_len + output_len > max_model_len:
        raise ContextLengthError(
            f"{name} of {counted(input_len, 'token')} and an output of {output_len} are "
            f"{input_len + output_len} together, more than the context of {max_model_len}; "
            "shorten one of them"
        )
