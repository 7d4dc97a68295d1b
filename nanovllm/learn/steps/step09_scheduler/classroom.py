"""A scheduler with a fake model, for the cases of step 9.

The fake model stores the token and the position of each computed token in its slot, and its next
token depends on everything stored for a sequence. So a wrong block, position or length gives wrong
tokens.
"""

from collections.abc import Sequence as Row
from types import ModuleType
from typing import Any

from nanovllm.learn.checking import Calls, require
from nanovllm.learn.steps.step08_blocks.solution import BlockManager, num_blocks_for

BLOCK_SIZE = 8
_VOCAB = 1000
_MAX_STEPS = 400


def prompt(name: str, length: int, shared: int = 0) -> list[int]:
    """Return a prompt of which the first `shared` tokens are the same for all names."""
    own = [100 * (ord(name[0]) % 10) + index % 100 for index in range(shared, length)]
    return [*range(shared), *own]


def next_token(stored: Row[tuple[int, int]]) -> int:
    """Return the fake model's next token after these tokens and their positions."""
    total = 7
    for token, position in stored:
        total = (total * 31 + token * 7 + position) % 1_000_003
    return total % _VOCAB


def generate_alone(sequence: Any) -> list[int]:
    """Return what the fake model generates for a sequence that runs alone."""
    tokens, output = list(sequence.prompt), list[int]()
    while len(output) < sequence.max_new_tokens:
        output.append(next_token([(token, at) for at, token in enumerate(tokens + output)]))
        if output[-1] in sequence.stop_token_ids:
            break
    return output


class Classroom:
    """A scheduler of 16 blocks of 8 tokens that computes at most 24 tokens a step.

    Attributes:
        blocks: the solution of step 8.
        calls: the plans and results of all steps.
    """

    def __init__(
        self,
        module: ModuleType,
        *,
        num_blocks: int = 16,
        max_tokens: int = 24,
        max_sequences: int = 8,
    ) -> None:
        """Make the reader's scheduler."""
        self.module = module
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = module.Scheduler(self.blocks, max_tokens, max_sequences)
        self.calls = Calls()
        self._stored = [(-1, -1)] * (num_blocks * BLOCK_SIZE)

    def new(self, name: str, length: int, max_new_tokens: int = 4, **settings: Any) -> Any:
        """Return a sequence."""
        tokens = prompt(name, length, settings.pop("shared", 0))
        return self.module.Sequence(name, tokens, max_new_tokens, **settings)

    def add(self, name: str, length: int, max_new_tokens: int = 4, **settings: Any) -> Any:
        """Return a new sequence, which waits."""
        sequence = self.new(name, length, max_new_tokens, **settings)
        self.scheduler.add(sequence)
        return sequence

    def put(self, name: str, length: int, computed: int, max_new_tokens: int = 4) -> Any:
        """Return a new sequence that runs with blocks for its tokens; nothing of it is cached.

        With `computed` one below `length`, its last token was generated and it decodes.
        """
        known = length - (computed == length - 1)
        sequence = self.new(name, known, max_new_tokens)
        sequence.tokens += [500] * (length - known)
        sequence.num_computed = computed
        sequence.block_ids = self.blocks.allocate(num_blocks_for(length, BLOCK_SIZE))
        self.scheduler.running.append(sequence)
        return sequence

    def note(self, text: str, value: object) -> None:
        """Record the result of a call, and what the scheduler knows afterwards."""
        queues = {
            f"and then `{queue}`": [one.name for one in getattr(self.scheduler, queue)]
            for queue in ("waiting", "running")
        }
        self.calls.add(text, {"": value} | queues | {"and then num_free": self.blocks.num_free})

    def note_sequence(self, sequence: Any, when: str) -> None:
        """Record the state of a sequence."""
        state = {
            "len(block_ids)": len(sequence.block_ids),
            "num_computed": sequence.num_computed,
            "num_preemptions": sequence.num_preemptions,
            "tokens": list(sequence.tokens),
        }
        self.calls.add(f"{sequence.name} {when},", state)

    def call(self, text: str, method: str, *values: Any) -> Any:
        """Call a method of the scheduler and record what it returned."""
        result = getattr(self.scheduler, method)(*values)
        self.note(text, shown(result))
        return result

    def step(self, name: str) -> list[Any]:
        """Plan, compute and commit a step, record it, and return the chunks."""
        chunks = self.scheduler.schedule()
        self.note(f"the plan of {name}", shown(chunks))
        sampled = self._compute(chunks) if chunks else []
        self.calls.add(f"the tokens of {name}", sampled)
        self.note(f"commit of {name}", shown(self.scheduler.commit(chunks, list(sampled))))
        return chunks

    def run(self) -> Calls:
        """Make steps until nothing is left, and return what was recorded."""
        for number in range(1, _MAX_STEPS):
            if not self.scheduler.waiting and not self.scheduler.running:
                return self.calls
            if not self.step(f"step {number}"):
                return self.calls  # it is stuck, and the solution is not
        return self.calls

    def _compute(self, chunks: list[Any]) -> list[int]:
        """Return the fake model's next token of each chunk that samples."""
        for chunk in chunks:
            sequence, needed = chunk.sequence, num_blocks_for(chunk.start + chunk.count, BLOCK_SIZE)
            require(
                len(sequence.block_ids) >= needed,
                f"{sequence.name} has {len(sequence.block_ids)} blocks, and its chunk of "
                f"{chunk.count} tokens from position {chunk.start} needs {needed}",
            )
        batch = self.module.build_batch(chunks, BLOCK_SIZE)
        rows = zip(batch.slots, batch.token_ids, batch.positions, strict=True)
        for slot, token, position in rows:
            self._stored[slot] = (token, position)
        sampled = []
        for chunk, table, length in zip(
            chunks, batch.block_tables, batch.context_lens, strict=True
        ):
            if chunk.samples:
                places = range(length)
                slots = [table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in places]
                sampled.append(next_token([self._stored[slot] for slot in slots]))
        return sampled


def shown(value: Any) -> object:
    """Return chunks as "a 0 to 23", sequences by their names, and other values as they are."""
    if not isinstance(value, list):
        return value
    return [_chunk(one) if hasattr(one, "sequence") else getattr(one, "name", one) for one in value]


def _chunk(chunk: Any) -> str:
    end = chunk.start + chunk.count - 1
    if chunk.count < 1:
        return f"{chunk.sequence.name} without tokens"
    return f"{chunk.sequence.name} {chunk.start}" + (f" to {end}" if chunk.count > 1 else "")
