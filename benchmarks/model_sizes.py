"""Measure memory and speed of each GPT-2 size in each weight type.

Run: python benchmarks/model_sizes.py --types float32,bfloat16,int8 --json sizes.json
     python benchmarks/table.py sizes.json --write docs/how-to/models.md

Each pair of a size and a type runs in a process of its own: it loads a model with random weights,
decodes one sequence, computes one prompt of 512 tokens, and reports its memory. A model that is
missing in --folder is made there (6.2 GB for gpt2-xl); --remove deletes it afterwards.
"""

import argparse
import contextlib
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import CLASSES, OUR_OPTIONS, ROOT
from benchmarks.make_model import SIZES
from benchmarks.options import MODEL, ensure_model, finish, new_parser, tell
from benchmarks.worker import peak_bytes, resident_bytes
from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.cli.argument_types import names_of

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
_ROUNDS = 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, *MODEL)
    parser.add_argument(
        "--sizes", type=names_of(list(SIZES)), default=",".join(SIZES), help="sizes (%(default)s)"
    )
    parser.add_argument(
        "--types", type=names_of(CLASSES), default=",".join(CLASSES), help="types (%(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "models", help="folder of the models (%(default)s)"
    )
    parser.add_argument("--remove", action="store_true", help="delete the models that were made")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size in every type and report."""
    parsed = parse(arguments)
    points: list[dict[str, Any]] = []
    for size in parsed.sizes:
        with _model(parsed.folder / f"{size}-random", size, remove=parsed.remove) as model:
            points += [
                {"size": size, "type": kind, **measure_alone(model, kind, parsed)}
                for kind in parsed.types
            ]
    finish({"benchmark": "sizes", "points": points}, parsed)
    return 0


@contextlib.contextmanager
def _model(folder: Path, size: str, *, remove: bool) -> Iterator[Path]:
    is_new = not folder.exists()
    ensure_model(folder, size)
    try:
        yield folder
    finally:
        if remove and is_new:
            shutil.rmtree(folder)


def measure_alone(model: Path, kind: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process, whose memory holds nothing else."""
    tell(f"{model.name} in {kind}")
    options = {
        "num_threads": parsed.threads, "max_num_seqs": 1, "enable_prefix_caching": False,
        **OUR_OPTIONS[kind], **parsed.ours,
    }  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, model, options, parsed.seed, parsed.scale).result()


def measure(model: Path, options: dict[str, Any], seed: int, scale: int) -> dict[str, Any]:
    """Load a model and return its memory in bytes and its speeds in tokens per second."""
    llm = LLM(model, **options)
    rng = np.random.default_rng(seed)

    def run(prompt_tokens: int, max_tokens: int) -> RequestOutput:
        prompt = rng.integers(llm.get_tokenizer().vocab - 1, size=max(1, prompt_tokens // scale))
        params = SamplingParams(
            max_tokens=max(2, max_tokens // scale), temperature=0, ignore_eos=True
        )
        return llm.generate(prompt, params, use_tqdm=False)[0]

    run(16, 2)
    decodes, prefills = [], []
    for _ in range(_ROUNDS):
        metrics = run(16, DECODE_TOKENS + 1).metrics
        assert metrics is not None
        assert metrics.finished_s is not None
        assert metrics.first_token_s is not None
        decodes.append(
            max(1, DECODE_TOKENS // scale) / (metrics.finished_s - metrics.first_token_s)
        )
        metrics = run(PREFILL_TOKENS, 2).metrics
        assert metrics is not None
        assert metrics.first_token_s is not None
        assert metrics.first_scheduled_s is not None
        prefills.append(
            PREFILL_TOKENS // scale / (metrics.first_token_s - metrics.first_scheduled_s)
        )
    return {
        "parameters": llm.engine.model.num_parameters,
        "resident_bytes": resident_bytes(),
        "peak_bytes": peak_bytes(),
        "decode_tokens_per_s": statistics.median(decodes),
        "prefill_tokens_per_s": statistics.median(prefills),
    }


if __name__ == "__main__":
    sys.exit(main())
