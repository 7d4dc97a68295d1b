"""Write what a model makes of passages of books: training text for its draft model.

Run: python scripts/bundled_model/write_target_text.py MODEL BOOKS OUTPUT

A draft model guesses what its target will write, so it learns from that, beside the books. Each
text begins with the first words of a paragraph and goes on to the end of the model's context, in
a file for each of the temperatures 1, 0.8 and 0.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanovllm import LLM, SamplingParams

_PROMPT_WORDS = 12
_TEMPERATURES = (1.0, 0.8, 0.0)


def prompts_of(books: Sequence[Path], count: int, seed: int) -> list[str]:
    """Return the first words of `count` paragraphs, drawn without replacement where there are
    enough."""
    words = (
        paragraph.split()
        for book in books
        for paragraph in book.read_text(encoding="utf-8").split("\n\n")
    )
    starts = [" ".join(each[:_PROMPT_WORDS]) for each in words if len(each) > _PROMPT_WORDS]
    random.Random(seed).shuffle(starts)
    return [starts[i % len(starts)] for i in range(count)]


def write(model: str, books: Sequence[Path], output: Path, count: int) -> int:
    """Write `count` texts at each temperature to a new folder; return the tokens generated."""
    output.mkdir(parents=True)
    tokens = 0
    with LLM(model) as llm:
        for order, temperature in enumerate(_TEMPERATURES):
            settings = SamplingParams(max_tokens=None, temperature=temperature, top_p=1)
            params = [replace(settings, seed=seed) for seed in range(count)]
            results = llm.generate(prompts_of(books, count, order), params)
            tokens += sum(len(each.outputs[0].token_ids) for each in results)
            text = "\n\n".join(f"{each.prompt}{each.outputs[0].text}" for each in results)
            (output / f"temperature-{temperature}.txt").write_text(text + "\n", encoding="utf-8")
    return tokens


def main() -> int:
    """Write the texts of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name or folder of the target model")
    parser.add_argument("books", type=Path, help="folder that prepare_books.py wrote")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--texts", type=int, default=1600, help="at each temperature")
    parsed = parser.parse_args()
    books = sorted(parsed.books.glob("train-*.txt"))
    if not books:
        parser.error(f"{parsed.books} has no train-*.txt")
    print(f"{write(parsed.model, books, parsed.output, parsed.texts):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
