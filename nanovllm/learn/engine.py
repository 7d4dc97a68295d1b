"""The engine of backend="learn:DIR": the reader's code where it is written, else the project's."""

from functools import partial
from pathlib import Path

from nanovllm.config import EngineConfig
from nanovllm.engine.engine_parts import EngineParts, PartOwner
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.learn.backend import LearnBackend
from nanovllm.learn.course import STEPS
from nanovllm.learn.folder import CourseFolder
from nanovllm.learn.guard import Guard, OnStuck
from nanovllm.learn.parts import Parts, load_parts
from nanovllm.learn.scheduler import CourseScheduler
from nanovllm.learn.streaming import CourseInputProcessor

ENGINE_PARTS = (
    ("embedding", "step02_logits", ("embed",)),
    ("logits", "step02_logits", ("logits",)),
    ("layer normalization", "step03_layer_norm", ("layer_norm",)),
    ("attention", "step04_attention", ("split_heads", "merge_heads", "attention")),
    ("linear layers", "step05_forward", ("linear",)),
    ("feed-forward network", "step05_forward", ("feed_forward",)),
    ("greedy choice", "step06_sampling", ("greedy",)),
    ("sampling", "step06_sampling", ("sample",)),
    ("KV cache", "step08_blocks", ("write", "gather")),
    ("block manager", "step08_blocks", ("BlockManager",)),
    ("scheduler", "step09_scheduler", ("Scheduler",)),
    ("streamed text", "step10_streaming", ("Utf8Stream",)),
    ("stop strings", "step10_streaming", ("StopStrings",)),
)
"""What an engine uses of the course: the part, its module and the names in it."""
ENGINE_STEPS = STEPS[:10]
"""The steps that an engine loads: training and step 12 are not a part of it."""


def check_config(config: EngineConfig) -> None:
    """Raise ValueError if the course's engine cannot have these settings."""
    if config.scheduling_policy != "fcfs":
        raise ValueError(
            f"scheduling_policy is {config.scheduling_policy!r}, but the course's scheduler "
            "runs requests in the order of arrival; leave it out"
        )


def learn_parts(folder: Path, on_stuck: OnStuck | None = None) -> EngineParts:
    """Return the parts of an engine that runs the code in `folder`.

    `on_stuck` hears of a call that does not end; see Guard.

    Raises:
        InvalidRequestError: it is no reader's folder.
        ReadersCodeError: a file in it cannot be loaded.
    """
    CourseFolder.find(folder)
    return engine_parts_of(load_parts(folder.resolve(), ENGINE_STEPS), folder, on_stuck)


def engine_parts_of(parts: Parts, folder: Path, on_stuck: OnStuck | None = None) -> EngineParts:
    """Return the parts of an engine that runs loaded code; errors name the files of `folder`."""
    guard = Guard(folder, on_stuck)

    def make_scheduler(config: EngineConfig, num_blocks: int) -> Scheduler:
        check_config(config)
        return CourseScheduler(parts, guard, config, num_blocks)

    return EngineParts(
        backend=partial(LearnBackend.load, parts=parts, guard=guard),
        make_scheduler=make_scheduler,
        input_processor=partial(CourseInputProcessor, parts, guard),
        name=f"learn:{folder}",
        owners=tuple(
            PartOwner(part, is_readers=all(name in parts.written[module] for name in names))
            for part, module, names in ENGINE_PARTS
        ),
    )
