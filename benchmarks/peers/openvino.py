"""OpenVINO GenAI with continuous batching.

A variant is WEIGHTS:PRECISION, such as int8:bf16; openvino-WEIGHTS is an exported model's folder.
"""

from pathlib import Path
from typing import Any

from benchmarks.worker import serve

_CACHE_GB = 2
_BATCH_TOKENS = 2048


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load the folder openvino-WEIGHTS, in the model's folder or beside it."""
    import numpy as np  # noqa: PLC0415 - the libraries tell that they are missing
    import openvino  # noqa: PLC0415
    import openvino_genai  # noqa: PLC0415

    weights, precision = variant.split(":")
    folders = [parent / f"openvino-{weights}" for parent in (model, model.parent)]
    found = [folder for folder in folders if (folder / "openvino_model.xml").is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folders[0]} is missing; make it with optimum-cli export openvino "
            f"--weight-format {weights}"
        )
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = _CACHE_GB, False
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = _BATCH_TOKENS, 32
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "KV_CACHE_PRECISION": "f32" if variant == "fp32:f32" else "u8",
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(found[0]), scheduler, "CPU", options)

    def setting(length: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = length
        config.ignore_eos, config.do_sample = True, False
        return config

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [setting(length) for length in lengths])
        return [list(map(int, result.m_generation_ids[0])) for result in results]

    return generate, {"versions": {"openvino-genai": openvino_genai.__version__}}


if __name__ == "__main__":
    serve(load)
