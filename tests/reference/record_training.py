"""Record the losses, gradients and updates that torch computes, for machines that lack it.

    PYTHONPATH=. python tests/reference/record_training.py

needs torch and transformers, and writes recorded_training.npz beside this file. The tensors of a
network are joined to one array, in the order of their names.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nanovllm.training.network.parameters import is_decayed
from tests.reference.cases import (
    TRAINING_CASES,
    UPDATE_CASE,
    UPDATE_CLIPS,
    UPDATE_DECAY,
    UPDATE_RATE,
    training_tokens,
)
from tests.support.checkpoints import write_checkpoint

FOLDER = Path(__file__).parent
UPDATES = 2


def load_model(name: str) -> Any:
    """Return the network of a case in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), **TRAINING_CASES[name])
        return transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def tensors_of(model: Any) -> dict[str, Any]:
    """Return the parameters by their names without prefix, in the order of names."""
    named = {
        name.removeprefix("transformer."): parameter for name, parameter in model.named_parameters()
    }
    return dict(sorted(named.items()))


def joined(tensors: list[Any]) -> np.ndarray:
    """Return the numbers of all tensors in one array."""
    numbers: np.ndarray = torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()
    return numbers


def differentiate(model: Any) -> tuple[float, list[Any]]:
    """Return the loss on `training_tokens`, and the gradient of each tensor."""
    token_ids = torch.from_numpy(training_tokens())
    loss = model(input_ids=token_ids, labels=token_ids).loss
    loss.backward()
    return float(loss.detach()), [one.grad.clone() for one in tensors_of(model).values()]


def record_updates(grad_clip: float) -> dict[str, np.ndarray]:
    """Return the norm of the gradients, and the parameters [updates, numbers] after each update."""
    model = load_model(UPDATE_CASE)
    tensors = tensors_of(model)
    _, gradients = differentiate(model)
    groups = [
        {
            "params": [tensor for name, tensor in tensors.items() if is_decayed(name) == decays],
            "weight_decay": UPDATE_DECAY if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=UPDATE_RATE, betas=(0.9, 0.95), eps=1e-8)
    after = []
    for _ in range(UPDATES):
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            tensor.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizer.step()
        after.append(joined(list(tensors.values())))
    return {"norm": np.array(float(norm)), "parameters": np.stack(after)}


def main() -> None:
    """Record all cases."""
    arrays: dict[str, np.ndarray] = {}
    for name in TRAINING_CASES:
        loss, gradients = differentiate(load_model(name))
        arrays[f"{name}/loss"] = np.array(loss)
        arrays[f"{name}/gradients"] = joined(gradients)
    for grad_clip in UPDATE_CLIPS:
        for key, value in record_updates(grad_clip).items():
            arrays[f"update-{grad_clip}/{key}"] = value
    np.savez_compressed(FOLDER / "recorded_training.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
