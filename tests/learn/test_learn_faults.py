"""What is wrong in the reader's code ends the requests concerned with its place; the engine stays."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.errors import EngineFaultError
from nanovllm.learn import guard
from nanovllm.learn.course import STEPS
from nanovllm.learn.engine import load_learn_engine
from nanovllm.learn.folder import CourseFolder
from nanovllm.sampling_params import SamplingParams
from tests.learn.test_learn_engine import CLASSROOM

PROMPT = list(range(10, 30))
SCHEDULER, BLOCKS = "step09_scheduler", "step08_blocks"
FAULTS = [
    # (file, what is replaced, by what, the message)
    ("step03_layer_norm", "    centred =", "    1 / 0\n    centred =",
     r"step03_layer_norm.py, line \d+, in layer_norm: ZeroDivisionError: division by zero"),
    ("step03_layer_norm", "    centred =", "    return hidden[:1]\n    centred =",
     r"step03_layer_norm.py, line \d+, in layer_norm: it returned an array of shape"),
    ("step06_sampling", "    return int(logits.argmax())", "    return logits.size",
     r"step06_sampling.py, line \d+, in greedy: it returned \d+, expected 0 to \d+"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        return []",
     "in Scheduler.schedule: it planned nothing, and 2 sequences are unfinished"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        while True:\n            left = 1",
     r"step09_scheduler.py, line \d+, in schedule: it did not end within 0.2 s"),
    (SCHEDULER, "count = min(sequence.num_uncomputed, left)", "count = sequence.num_uncomputed",
     r"the step has 40 tokens, the budget is 24 \(max_tokens\)"),
    (SCHEDULER, "len(self.running) < self.max_sequences", "True", None),
    (SCHEDULER, "            sequence.num_computed += chunk.count",
     "            sequence.num_computed += chunk.count + 1", "count as computed, expected"),
    (SCHEDULER, "                sequence.tokens.append(token)",
     "                sequence.tokens.append(token + 1)", "are not what was sampled"),
    (SCHEDULER, "len(sequence.output) == sequence.max_new_tokens",
     "len(sequence.output) == sequence.max_new_tokens + 1", r"should have ended \(length\)"),
    (SCHEDULER, "                    self.finish(sequence)\n", "",
     "has ended, and is still in `running` or `waiting`"),
    (BLOCKS, "taken = [self._free.popitem(last=False)[0] for _ in range(count)]",
     "taken = list(self._free)[:count]", "a block is free and held at once"),
    (BLOCKS, "            self._counts[block] = 1", "            self._counts[block] = 2",
     "a block was not freed"),
    (BLOCKS, "hash_block(parent, tokens[", "hash_block(b'', tokens[",
     "count as computed|counts 8 tokens as computed|handed out twice"),
]  # fmt: skip


def folder_with(path: Path, module: str, old: str, new: str) -> Path:
    """Write the solutions with a passage replaced."""
    CourseFolder.start(path, has_solutions=True)
    file = path / f"{module}.py"
    source = file.read_text(encoding="utf-8")
    assert old in source, old
    file.write_text(source.replace(old, new), encoding="utf-8")
    return path


def run(engine: Engine, *prompts: Any, **settings: Any) -> list[Any]:
    """Return the outputs of prompts that begin together."""
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **settings})
    request = GenerationRequest(prompts=list(prompts), params=params, request_id="test")
    processed = engine.input_processor.process(request)
    for _ in engine.run(processed):
        engine.check_integrity()
    return [prompt.output() for prompt in processed]


@pytest.mark.parametrize(("module", "old", "new", "message"), FAULTS)
def test_a_fault_ends_the_requests_and_names_its_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: str, old: str, new: str, message: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr("nanovllm.learn.scheduler.TEXT_S", 0.2)
    assert any(step.module == module for step in STEPS)
    folder = folder_with(tmp_path / "gpt", module, old, new)
    engine = load_learn_engine(tiny_model, folder, EngineConfig(**CLASSROOM))
    if message is None:
        return
    prompts = [PROMPT, [*PROMPT[:8], *PROMPT[:-9:-1], 1, 2, 3, 4]]
    for _ in range(2):  # the engine goes on after a fault
        with pytest.raises(EngineFaultError, match=message):
            for _ in range(4):
                run(engine, *prompts)
        engine.check_integrity()
        assert not engine.has_work
        assert engine.stats().kv_cache_usage == 0.0
