"""Training speed of PyTorch, eager in float32.

Options: {"compile": true} for torch.compile, {"bfloat16": true} for autocast.
"""

import time
from typing import Any

from benchmarks.training_worker import GRAD_CLIP, Setting, Step, serve


def load(
    setting: Setting, options: dict[str, Any], threads: int, seed: int
) -> tuple[Step, dict[str, Any]]:
    """Return a function that takes a step."""
    import torch  # noqa: PLC0415 - the worker tells that it is missing

    from benchmarks.peers.torch_gpt2 import GPT2, make_optimizer  # noqa: PLC0415

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = GPT2(setting)
    optimizer = make_optimizer(model)
    compute_loss = torch.compile(model) if options.get("compile") else model
    uses_bfloat16 = bool(options.get("bfloat16"))

    def step() -> tuple[float, float]:
        tokens = torch.randint(0, setting.vocab, (setting.batch, setting.context + 1))
        started_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16):
            loss = compute_loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started_s, loss.item()

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return step, {"versions": {"torch": torch.__version__}, "parameters": parameters}


if __name__ == "__main__":
    serve(load)
