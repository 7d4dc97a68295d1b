"""transformers' generate in static batches of 8, padded on the left. A variant is a dtype."""

from pathlib import Path
from typing import Any

from benchmarks.worker import in_groups, serve

_BATCH = 8


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load the model in PyTorch, eager."""
    import torch  # noqa: PLC0415 - the libraries tell that they are missing
    import transformers  # noqa: PLC0415

    torch.set_num_threads(threads)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        str(model), dtype=getattr(torch, variant), local_files_only=True
    ).eval()
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0

    def answer(prompts: list[list[int]], longest: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            found = network.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
            )
        answers: list[list[int]] = found[:, width:].tolist()
        return answers

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return [
            tokens[:length]
            for group, wanted in in_groups(prompts, lengths, _BATCH)
            for tokens, length in zip(answer(group, max(wanted)), wanted, strict=True)
        ]

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return generate, {"versions": versions, "note": f"static batches of {_BATCH}"}


if __name__ == "__main__":
    serve(load)
