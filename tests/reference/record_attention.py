"""Record the attention weights that transformers computes, for machines that lack it.

    PYTHONPATH=. python tests/reference/record_attention.py

needs torch and transformers, and writes recorded_attention.npz beside this file.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.reference.cases import ATTENTION_CASES, attention_prompt, options_of
from tests.support.checkpoints import write_checkpoint

FOLDER = Path(__file__).parent


def reference_attention(folder: Path, token_ids: np.ndarray) -> np.ndarray:
    """Return attention weights [layers, heads, queries, keys] in float32, computed eagerly."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(token_ids)[None], output_attentions=True, use_cache=False)
    weights: np.ndarray = torch.cat(output.attentions).numpy()
    return weights


def main() -> None:
    """Record all cases."""
    arrays = {}
    for name in ATTENTION_CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), **options_of(name))
            arrays[name] = reference_attention(Path(folder), attention_prompt())
    np.savez_compressed(FOLDER / "recorded_attention.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
