"""nanovllm verify MODEL: compare a checkpoint with an installed transformers."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser("verify", help="compare a model with transformers", description=__doc__)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compare."""
    raise ValueError(f"nothing to compare in {parsed}")
