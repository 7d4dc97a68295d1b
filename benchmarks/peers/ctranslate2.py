"""CTranslate2 in static batches of 8, each padded to its longest output.

A variant is a compute type.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.worker import in_groups, serve

_BATCH = 8


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load the folder ctranslate2 in the model's folder, which is made if missing."""
    import ctranslate2  # noqa: PLC0415 - tells that it is missing

    folder = model / "ctranslate2"
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(str(model)).convert(str(folder))
    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=variant, intra_threads=threads, inter_threads=1
    )

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        answers: list[list[int]] = []
        for group, wanted in in_groups(prompts, lengths, _BATCH):
            results = generator.generate_batch(
                [[words[token] for token in prompt] for prompt in group],
                max_length=max(wanted),
                min_length=max(wanted),
                sampling_topk=1,
                beam_size=1,
                include_prompt_in_result=False,
                end_token=[],
                max_batch_size=_BATCH,
            )
            answers += [
                result.sequences_ids[0][:length]
                for result, length in zip(results, wanted, strict=True)
            ]
        return answers

    return generate, {
        "versions": {"ctranslate2": ctranslate2.__version__},
        "note": f"static batches of {_BATCH}",
    }


if __name__ == "__main__":
    serve(load)
