"""Engines that draft tokens as if rows were free: the cost model would not, for so small models."""

from nanovllm.engine.engine import Engine
from nanovllm.engine.speculation.cost_model import StepTimes


def draft_always(engine: Engine) -> Engine:
    """Have the engine draft as if rows were free, if it drafts at all; return it."""
    if engine.speculator is not None:
        engine.speculator.times = StepTimes((1, 512), (1.0, 1.0001))
        engine.speculator.draft_times = StepTimes((1, 512), (1e-6, 1e-6))
    return engine
