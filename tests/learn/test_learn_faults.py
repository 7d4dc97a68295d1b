"""What is wrong in the reader's code ends the requests concerned; the engine goes on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import EngineFaultError
from nanovllm.learn.engine import learn_parts
from nanovllm.learn.folder import CourseFolder
from nanovllm.sampling_params import SamplingParams
from tests.learn.test_learn_engine import CLASSROOM

PROMPT = list(range(10, 30))
SCHEDULER, BLOCKS = "step09_scheduler", "step08_blocks"
FAULTS = [
    # (file, what is replaced, by what, the message)
    ("step03_layer_norm", "    centred =", "    1 / 0\n    centred =",
     r"step03_layer_norm.py, line \d+, in layer_norm: ZeroDivisionError: division by zero"),
    ("step03_layer_norm", "    centred =", "    return hidden[0]\n    centred =",
     r"step03_layer_norm.py, line \d+, in layer_norm: it returned an array of shape"),
    ("step06_sampling", "    return int(logits.argmax())", "    return logits.size",
     r"step06_sampling.py, line \d+, in greedy: it returned \d+, expected 0 to \d+"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        return []",
     "in Scheduler.schedule: it planned nothing, and 2 sequences left unfinished"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        while True:\n            left = 1",
     r"step09_scheduler.py, line \d+, in schedule: it did not end within 0.2 s"),
    (SCHEDULER, "count = min(sequence.num_uncomputed, left)", "count = sequence.num_uncomputed",
     r"the step has 32 tokens, the budget is 24 \(max_tokens\)"),
    (SCHEDULER, "            sequence.num_computed += chunk.count",
     "            sequence.num_computed += chunk.count + 1", "count as computed, expected"),
    (SCHEDULER, "                sequence.tokens.append(token)",
     "                sequence.tokens.append(token + 1)", "are not what was sampled"),
    (SCHEDULER, "len(sequence.output) == sequence.max_new_tokens",
     "len(sequence.output) == sequence.max_new_tokens + 1", r"should have ended \(length\)"),
    (SCHEDULER, "                    self.finish(sequence)\n", "",
     "has ended, and is still in `running` or `waiting`"),
    (BLOCKS, "taken = [self._free.popitem(last=False)[0] for _ in range(count)]",
     "taken = list(self._free)[:count]", "holds a block twice|a block is free and held at once"),
    (BLOCKS, "            self._counts[block] = 1", "            self._counts[block] = 2",
     "a block was not freed"),
    (BLOCKS, "hash_block(parent, tokens[", "hash_block(b'', tokens[",
     "counts 8 tokens as computed, but block 1 does not have those of its positions 0 to 7"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        exit()",
     r"step09_scheduler.py, line \d+, in schedule: SystemExit"),
    (SCHEDULER, "        chunks: list[Chunk] = []", "        raise GeneratorExit('left')",
     r"step09_scheduler.py, line \d+, in schedule: GeneratorExit: left"),
    (SCHEDULER, "        chunks: list[Chunk] = []",
     ("        import time\n        end = time.monotonic() + 3\n        try:\n"
     "            while time.monotonic() < end:\n                pass\n"
     "        except BaseException:\n            pass\n"
     "        while time.monotonic() < end:\n            pass\n        return []"),
     r"step09_scheduler.py, line \d+, in schedule: it did not end within 0.2 s"),
    (SCHEDULER, "        self.tokens = self.tokens or list(self.prompt)", "        [].pop()",
     r"step09_scheduler.py, line \d+, in __post_init__: IndexError"),
    (SCHEDULER, "            if not self.admit():",
     ("            if chunks:\n                self.waiting[0].num_computed = None\n"
     "                break\n            if not self.admit():"),
     r"step09_scheduler.py, line \d+, in Scheduler.schedule: TypeError"),
    (SCHEDULER, "    max_new_tokens: int\n", "    most: int\n",
     r"step09_scheduler.py, in Sequence: TypeError: .*max_new_tokens"),
    (SCHEDULER, "        return chunks\n", "        self.running = None\n        return chunks\n",
     r"step09_scheduler.py, line \d+, in Scheduler.schedule: `running` is a NoneType"),
    (SCHEDULER, "        return chunks\n",
     "        self.running.append(self.running[0])\n        return chunks\n",
     "is twice in `running`"),
    (SCHEDULER, "        return chunks\n", "        self.running.clear()\n        return chunks\n",
     "has not ended, and is neither in `running` nor `waiting`"),
    ("step04_attention", "    return attention_weights(queries, keys) @ values", "    return None",
     r"step04_attention.py, line \d+, in attention: it returned a NoneType"),
    ("step04_attention", "def split_heads(rows: np.ndarray, heads: int) -> np.ndarray:",
     "def split_heads(rows: np.ndarray, heads: int) -> np.ndarray:\n    return rows",
     r"step04_attention.py, line \d+, in split_heads: it returned an array of shape"),
    ("step04_attention", "def merge_heads(rows: np.ndarray) -> np.ndarray:",
     "def merge_heads(rows: np.ndarray) -> np.ndarray:\n    return rows",
     r"step04_attention.py, line \d+, in merge_heads: it returned an array of shape"),
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


def run_often(engine: Engine, *prompts: Any) -> None:
    """Run prompts several times: what is left behind shows later."""
    for _ in range(4):
        run(engine, *prompts)


@pytest.mark.parametrize(("module", "old", "new", "message"), FAULTS)
def test_a_fault_ends_the_requests_and_names_its_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: str, old: str, new: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("nanovllm.learn.scheduler.TEXT_S", 0.2)
    monkeypatch.chdir(tmp_path)
    folder = folder_with(Path("gpt"), module, old, new)
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    prompts = [PROMPT, [*PROMPT[8:16], *PROMPT[:4]]]
    for _ in range(2):  # the engine goes on after a fault
        with pytest.raises(EngineFaultError, match=message):
            run_often(engine, *prompts)
        engine.check_integrity()
        assert not engine.has_work
        assert engine.stats().kv_cache_usage == 0.0


def test_a_failed_step_ends_its_own_requests_and_the_others_begin_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = folder_with(
        tmp_path / "gpt", "step02_logits", "    return token_embedding[token_ids]",
        "    assert 99 not in token_ids, 'no 99'\n    return token_embedding[token_ids]",
    )  # fmt: skip
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    own = Engine.load(tiny_model, EngineConfig(**CLASSROOM))
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(prompts=[PROMPT, [99]], params=params, request_id="test")
    first, second = engine.input_processor.process(request)
    (sequence,) = first.requests
    engine.add_request(sequence)
    for _ in range(3):
        assert engine.step().fault is None
    num_tokens = len(sequence.tokens)
    engine.scheduler.running.clear()  # so that the second request runs alone in its step
    engine.scheduler.running.append(sequence)
    engine.add_request(second.requests[0])
    output = engine.step()
    assert "step02_logits.py, line" in str(output.fault)
    assert "AssertionError: no 99" in str(output.fault)
    assert {update.request_id for update in output.updates} == {
        sequence.request_id, second.requests[0].request_id
    }  # fmt: skip
    assert num_tokens > len(PROMPT)
    (expected,) = run(own, PROMPT, ignore_eos=True)
    (found,) = run(engine, PROMPT, ignore_eos=True)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_an_abort_that_fails_ends_the_others_with_its_place(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = folder_with(
        tmp_path / "gpt", SCHEDULER, "        self.blocks.free(sequence.block_ids)\n        seq",
        "        assert len(sequence.output) != 2\n"
        "        self.blocks.free(sequence.block_ids)\n        seq",
    )  # fmt: skip
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(prompts=[PROMPT, [9]], params=params, request_id="test")
    ids = []
    for prompt in engine.input_processor.process(request):
        engine.add_request(prompt.requests[0])
        ids.append(prompt.requests[0].request_id)
    engine.step()
    engine.step()
    assert engine.finish_request(ids[0], FinishReason.ABORT) is not None
    output = engine.step()
    assert "step09_scheduler.py, line" in str(output.fault)
    assert [update.request_id for update in output.updates] == ids[1:]
    assert not engine.has_work
    assert engine.finish_request(ids[0], FinishReason.ABORT) is None


def test_streamed_text_that_raises_ends_the_request(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "gpt", "step10_streaming", "        data = self._pending + data",
        "        return None",
    )  # fmt: skip
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    (output,) = run(engine, PROMPT)
    assert "in Utf8Stream.push: it returned a NoneType, expected text" in str(output.error)
    assert not engine.has_work


def test_numbers_that_are_not_finite_leave_no_cached_block(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = folder_with(
        tmp_path / "gpt", "step02_logits", "    return token_embedding[token_ids]",
        "    if 99 in token_ids:\n"
        "        return np.full((len(token_ids), token_embedding.shape[1]), np.nan, np.float32)\n"
        "    return token_embedding[token_ids]",
    )  # fmt: skip
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    (output,) = run(engine, [*PROMPT[:16], 99])
    message = r"step02_logits\.py, line \d+, in embed: it returned numbers that are not finite"
    assert re.match(message, str(output.error))
    run(engine, [*PROMPT[:16], 98])
    assert engine.stats().prefix_cache_hits == 0


@pytest.mark.parametrize(
    ("module", "old", "function"),
    [
        ("step04_attention", "    weights = np.exp(", "attention"),
        ("step03_layer_norm", "    centred =", "layer_norm"),
    ],
)
def test_the_function_whose_numbers_are_not_finite_is_named(
    tiny_model: Path, tmp_path: Path, module: str, old: str, function: str
) -> None:
    name = "scores" if function == "attention" else "hidden"
    folder = folder_with(tmp_path / "gpt", module, old, f"    {name} = {name} / 0 * 0\n{old}")
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    with np.errstate(all="ignore"):
        outputs = run(engine, PROMPT, [9], prompt_logprobs=0)
    for output in outputs:
        assert f", in {function}: it returned numbers that are not fin" in str(output.error)


def test_a_checkpoint_that_is_not_finite_is_not_the_readers(
    tiny_model: Path, tmp_path: Path
) -> None:
    CourseFolder.start(tmp_path / "gpt", has_solutions=True)
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(tmp_path / "gpt"))
    weights = engine.runner.backend._weights  # type: ignore[attr-defined]  # noqa: SLF001
    weights.layers[1].qkv.bias[3] = np.nan
    (output,) = run(engine, PROMPT)
    assert "is the checkpoint sound?" in str(output.error)


def test_an_exit_in_streamed_text_ends_the_request(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "gpt",
        "step10_streaming",
        "        data = self._pending + data",
        "        exit()",
    )
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    (output,) = run(engine, PROMPT)
    assert "in push: SystemExit" in str(output.error)


def test_a_restart_that_fails_ends_the_requests(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "gpt", BLOCKS, "        self.num_blocks = num_blocks\n",
        "        type(self).made = getattr(type(self), 'made', 0) + 1\n"
        "        assert self.made in (1, 4), 'made again'\n        self.num_blocks = num_blocks\n",
    )  # fmt: skip
    file = folder / "step02_logits.py"
    passage = "    return token_embedding[token_ids]"
    source = file.read_text(encoding="utf-8").replace(
        passage, f"    assert 99 not in token_ids, 'no 99'\n{passage}"
    )
    file.write_text(source, encoding="utf-8")
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    with pytest.raises(EngineFaultError, match="no 99"):
        run(engine, [99])
    for _ in range(2):  # the fault of the last attempt to make it; the next one follows
        with pytest.raises(EngineFaultError, match=r"step08_blocks.py, line .*made again"):
            run(engine, PROMPT)
    assert run(engine, PROMPT)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def find_prefix", "def find_first", "no attribute 'find_prefix'; it must have"),
        (
            "    @property\n    def num_free",
            (
                "    __slots__ = 'num_blocks block_size _free _counts _block_of _hash_of'.split()\n"
                "    @property\n    def num_free"
            ),
            "read-only; it",
        ),
    ],
)
def test_a_block_manager_that_cannot_be_used_is_named(
    tiny_model: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    folder = folder_with(tmp_path / "gpt", BLOCKS, old, new)
    with pytest.raises(EngineFaultError, match=f"step08_blocks.py, in BlockManager: .*{message}"):
        Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))


def test_blocks_may_be_integers_of_numpy(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "gpt", BLOCKS, "        return taken", "        return list(np.array(taken))"
    )
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(folder))
    own = Engine.load(tiny_model, EngineConfig(**CLASSROOM))
    assert run(engine, PROMPT)[0].outputs == run(own, PROMPT)[0].outputs
