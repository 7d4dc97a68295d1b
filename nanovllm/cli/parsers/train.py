"""The parser of `nanovllm train`."""

import argparse
from typing import Any

from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Train a GPT-2 from scratch, or fine-tune one, and write a Hugging Face checkpoint that
`nanovllm serve` and transformers load.

  nanovllm train --data shakespeare.txt --output run
  nanovllm train --data ~/project --pattern "*.py" --output run --layers 6 --width 384
  nanovllm train --data notes.txt --init-from gpt2 --context 256 --output run
  nanovllm train --resume run
  nanovllm serve ./run

The same settings, with underscores, may be in a TOML file (--config); the command line counts more.
Ctrl-C saves the state and ends the run.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train`."""
    parser = add_command(
        subparsers,
        "train",
        "nanovllm.cli.train:run",
        arguments="--data PATH... --output DIR [options]",
        summary="train or fine-tune a model on text",
        description=_DESCRIPTION,
        variables=("NANOVLLM_CACHE_DIR",),
    )
    parser.set_defaults(parser=parser)  # for errors that the settings have together
    _add_run_options(parser)
    _add_model_options(parser)
    _add_optimization_options(parser)
    _add_evaluation_options(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    _add(
        group,
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files, folders of them, or one token file (.npy, or .bin of uint16)",
    )
    _add(
        group,
        "--validation-data",
        nargs="+",
        metavar="PATH",
        help="text or a token file to validate on (default: the end of --data)",
    )
    _add(
        group,
        "--output",
        metavar="DIR",
        help="new or empty folder for checkpoint, metrics and report",
    )
    _add(
        group,
        "--pattern",
        metavar="GLOB",
        help="files to read from folders, but not from hidden ones, node_modules or virtual "
        "environments (default: *.txt)",
    )
    _add(group, "--config", metavar="FILE", help="TOML file with any of these settings")
    _add(group, "--resume", metavar="DIR", help="continue the run in DIR, to the same bits")
    _add(group, "--stop-after", type=int, metavar="STEP", help="save and end after this step")
    _add(group, "--seed", type=int, help="seed of weights, data order and dropout (default: 0)")
    _add(
        group,
        "--backend",
        metavar="NAME",
        help="numba: compiled kernels; numpy: the readable operations (default: numba)",
    )
    _add(
        group,
        "--num-threads",
        type=int,
        metavar="THREADS",
        help="threads of the kernels and of NumPy (default: all usable cores)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _add(group, "--layers", type=int, help="transformer blocks (default: 4)")
    _add(group, "--heads", type=int, help="attention heads (default: 4)")
    _add(group, "--width", type=int, help="width of the residual stream (default: 128)")
    _add(
        group,
        "--context",
        type=int,
        metavar="TOKENS",
        help="context length (default: 64, with --init-from the model's)",
    )
    _add(
        group,
        "--activation",
        metavar="NAME",
        help="gelu_new, gelu, quick_gelu, relu, relu2, silu, sigmoid, tanh, mish or another of "
        "docs/training.md (default: gelu_new)",
    )
    _add(
        group,
        "--positions",
        metavar="KIND",
        help="position embedding, learned or sinusoidal (default: learned)",
    )
    _add(
        group,
        "--preset",
        metavar="NAME",
        help="sizes of gpt2, gpt2-medium, gpt2-large or gpt2-xl",
    )
    _add(
        group,
        "--init-from",
        metavar="MODEL",
        help="fine-tune this model: a folder, or a name such as gpt2",
    )
    _add(
        group,
        "--tokenizer",
        metavar="KIND",
        help="char, bpe (trained on the data), gpt2, or a folder or tokenizer.json (default: bpe)",
    )
    _add(
        group,
        "--vocab-size",
        type=int,
        metavar="TOKENS",
        help="vocabulary of a bpe tokenizer (default: 1024, or what a small text gives)",
    )


def _add_optimization_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    _add(group, "--batch-size", type=int, metavar="SEQS", help="sequences per batch (default: 12)")
    _add(
        group,
        "--grad-accumulation",
        type=int,
        metavar="BATCHES",
        help="batches per update (default: 1)",
    )
    _add(group, "--steps", type=int, help="updates (default: 2000)")
    _add(group, "--epochs", type=int, help="passes over the data, instead of --steps")
    _add(group, "--lr", type=float, help="peak learning rate (default: 1e-3, fine-tuning 1e-4)")
    _add(group, "--min-lr", type=float, help="final learning rate (default: a tenth of --lr)")
    _add(
        group,
        "--warmup-steps",
        type=int,
        metavar="STEPS",
        help="updates to reach --lr (default: a twentieth of the steps, at most 100)",
    )
    _add(group, "--weight-decay", type=float, help="AdamW's decay of matrices (default: 0.1)")
    _add(group, "--grad-clip", type=float, help="maximum gradient norm, 0 for none (default: 1)")
    _add(group, "--beta1", type=float, help="AdamW's first decay rate (default: 0.9)")
    _add(group, "--beta2", type=float, help="AdamW's second decay rate (default: 0.99)")
    _add(group, "--dropout", type=float, help="dropout rate (default: 0)")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    _add(
        group,
        "--eval-every",
        type=int,
        metavar="STEPS",
        help="updates between evaluations (default: a tenth of the steps)",
    )
    _add(
        group,
        "--max-eval-batches",
        type=int,
        metavar="BATCHES",
        help="batches of an evaluation (default: the whole validation split)",
    )
    _add(
        group,
        "--patience",
        type=int,
        metavar="EVALS",
        help="end after this many evaluations without a lower validation loss",
    )
    _add(
        group,
        "--validation-fraction",
        type=float,
        metavar="F",
        help="part of the text, at its end, that is held out (default: 0.1)",
    )
    _add(
        group,
        "--sample-tokens",
        type=int,
        metavar="TOKENS",
        help="tokens to generate at each evaluation (default: 100)",
    )


def _add(group: Any, flag: str, **settings: Any) -> None:
    """Add an option that leaves no attribute unless it is given."""
    group.add_argument(flag, default=argparse.SUPPRESS, **settings)
