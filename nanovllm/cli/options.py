"""Options that several commands share: the model, the engine's settings, the sampler's settings.

Options are named like the settings. Nothing here takes long to import, see parsers/__init__.py.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.config import (
    BACKENDS,
    BUNDLED_MODEL,
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.chat.template import ChatTemplate

DEFAULT_MAX_TOKENS = 128  # of an answer on the terminal
_MODEL_HELP = (
    f"folder, or name such as gpt2 or owner/name (default: {BUNDLED_MODEL}, the bundled model)"
)


class _NameModel(argparse.Action):
    """Store the model, given by position or by --model; refuse two different ones.

    Of a repeated --model the last one counts, as of other options.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        is_flag = option_string is not None
        was_flag, earlier = getattr(namespace, "named_model", (is_flag, values))
        if was_flag is not is_flag and earlier != values:
            parser.error(f"two models are named, {earlier} and {values}; name one")
        namespace.model, namespace.named_model = values, (is_flag, values)


def add_model(
    parser: argparse.ArgumentParser, text: str = _MODEL_HELP, default: str | None = BUNDLED_MODEL
) -> None:
    """Add MODEL, by position, and --model."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", action=_NameModel, default=argparse.SUPPRESS, help=text
    )
    add_model_flag(parser, "the same, as an option", default)


def add_model_flag(
    parser: argparse.ArgumentParser, text: str = _MODEL_HELP, default: str | None = BUNDLED_MODEL
) -> None:
    """Add --model."""
    parser.add_argument("--model", metavar="MODEL", action=_NameModel, default=default, help=text)


def served_names(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Names of the model in the API: those of --served-model-name, or else that of the folder."""
    return tuple(parsed.served_model_name or (Path(parsed.model).name or str(parsed.model),))


_ENGINE_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_model_len": (
        int, "maximum tokens of prompt and answer together (default: the model's context)",
    ),
    "block_size": (int, "tokens in one block of the KV cache"),
    "max_num_seqs": (int, "maximum sequences in one step"),
    "max_num_batched_tokens": (int, "maximum tokens computed in one step"),
    "kv_cache_memory": (str, "memory for keys and values, such as 512MiB"),
    "num_threads": (int, "threads that compute (default: the cores this process may use)"),
    "max_logprobs": (int, "maximum log-probabilities a request may ask for at a position"),
}  # fmt: skip


def add_engine_options(
    parser: argparse.ArgumentParser, *, seed: int | None = None, prefix_caching: bool = True
) -> None:
    """Add an option for each field of EngineConfig, with these defaults of two of them."""
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    group = parser.add_argument_group("engine")
    choices: dict[str, tuple[tuple[str, ...], str]] = {
        "backend": (BACKENDS, "forward pass: numba is compiled, numpy is the one to read"),
        "dtype": (DTYPES, "type of the weights while computing"),
        "quantization": (QUANTIZATIONS, "quantize weights to one byte while loading (default: no)"),
        "kv_cache_dtype": (
            KV_CACHE_DTYPES,
            "type of keys and values; auto is float32 with float32 weights, bfloat16 with others",
        ),
        "scheduling_policy": (
            SCHEDULING_POLICIES,
            "order of requests: by arrival, or by their priority field and then by arrival",
        ),
    }
    for name, (values, text) in choices.items():
        group.add_argument(_option(name), choices=values, default=defaults[name], help=text)
    for name, (kind, text) in _ENGINE_OPTIONS.items():
        metavar = name.rsplit("_", 1)[-1].upper()
        group.add_argument(
            _option(name), type=kind, default=defaults[name], metavar=metavar, help=text
        )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=prefix_caching,
        help="reuse keys and values of prompts that begin alike",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make results independent of the batch, bit for bit; numba always is, numpy becomes "
        "slower (default: no)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="make the draws of requests without a seed repeatable"
        + (" (default: another seed each time)" if seed is None else ""),
    )


def engine_config(parsed: argparse.Namespace) -> EngineConfig:
    """The settings given by the options of `add_engine_options`."""
    names = {field.name for field in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in vars(parsed).items() if name in names})


_SAMPLING_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, f"maximum tokens to generate (default: {DEFAULT_MAX_TOKENS})"),
    "min_tokens": (int, "minimum tokens before an end of text or a stop string"),
    "temperature": (float, "scale of randomness; 0 for the most probable token"),
    "top_p": (float, "draw among the most probable tokens whose probabilities add up to this"),
    "top_k": (int, "draw among the k most probable tokens; 0 for all"),
    "min_p": (float, "drop tokens below this fraction of the highest probability"),
    "repetition_penalty": (float, "above 1: fewer repetitions"),
    "presence_penalty": (float, "above 0: fewer tokens that the answer already has"),
    "frequency_penalty": (float, "above 0: the same, by how often the answer has them"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add options for SamplingParams; those left out keep the model's own defaults."""
    group = parser.add_argument_group(
        "sampling",
        "Defaults in the model's generation_config.json take the place of those below.",
    )
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, (kind, text) in _SAMPLING_OPTIONS.items():
        shown = text if "default" in text else f"{text} (default: {defaults[name]})"
        metavar = re.sub(".*_", "", name).upper()
        group.add_argument(_option(name), type=kind, metavar=metavar, help=shown)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text that ends the answer; repeat for several (default: none)",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="go on after the end-of-text token (default: no)",
    )


def sampling_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings of SamplingParams that were given as options."""
    names = {field.name for field in fields(SamplingParams)}
    return {
        name: value for name, value in vars(parsed).items() if name in names and value is not None
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_chat_template(group: "argparse._ActionsContainer") -> None:
    """Add the option that gives a chat template."""
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template for chat (default: the model's own)",
    )


def load_chat_template(folder: Path, parsed: argparse.Namespace) -> "ChatTemplate | None":
    """Return the option's template, or else the model's, if any.

    Raises CheckpointError if the option's template cannot be used.
    """
    from nanovllm.engine.chat.template import ChatTemplate  # noqa: PLC0415 - slow to import

    template = ChatTemplate.load(folder, parsed.chat_template)
    if template is not None and parsed.chat_template is not None:
        template.check()
    return template
