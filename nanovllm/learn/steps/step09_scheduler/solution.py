"""Step 9: continuous batching (Orca, Yu et al., OSDI 2022) with prompts in chunks (Sarathi-Serve,
Agrawal et al. 2024, arXiv:2403.02310), and preemption when no block is free.
"""

from dataclasses import dataclass, field

from nanovllm.learn.steps.step08_blocks.solution import BlockManager, num_blocks_for, slots


@dataclass(eq=False)
class Sequence:  # given
    """A prompt and what has been generated for it.

    Attributes:
        name: of the sequence, for messages.
        prompt: token ids, at least one.
        max_new_tokens: number of tokens to generate, from 1.
        stop_token_ids: tokens that end it; such a token is the last of the output.
        tokens: the prompt, followed by what was generated.
        num_computed: number of tokens whose keys and values are in the blocks.
        block_ids: the blocks that it holds, in order; empty while it waits.
        num_preemptions: how often its blocks were taken away.
    """

    name: str
    prompt: list[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        """Start with the tokens of the prompt."""
        self.tokens = self.tokens or list(self.prompt)

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_uncomputed(self) -> int:
        """Number of tokens that are known but not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether one token is left to compute, after which the next one is sampled."""
        return self.num_uncomputed == 1


@dataclass(frozen=True)
class Chunk:  # given
    """The part of a step that belongs to one sequence: `count` tokens from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether it has the last known token, so that the step gives the next one."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True)
class Batch:  # given
    """The input of a forward pass: the tokens of all chunks, one chunk after the other.

    Attributes:
        token_ids, positions, slots: of each token; a slot is where its key and value are stored.
        query_starts: index of each chunk's first token, and the number of tokens at the end.
        context_lens: number of tokens that each sequence has in its blocks after the step.
        block_tables: the blocks of each sequence, with zeros behind the shorter ones.
        logit_rows: index of the last token of each chunk that samples.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]


def build_batch(chunks: list[Chunk], block_size: int) -> Batch:  # given
    """Return the batch of a step."""
    batch = Batch([], [], [], [0], [], [], [])
    num_blocks = max(len(chunk.sequence.block_ids) for chunk in chunks)
    for chunk in chunks:
        blocks, end = chunk.sequence.block_ids, chunk.start + chunk.count
        batch.token_ids.extend(chunk.sequence.tokens[chunk.start : end])
        batch.positions.extend(range(chunk.start, end))
        batch.slots.extend(slots(blocks, chunk.start, chunk.count, block_size))
        batch.query_starts.append(len(batch.token_ids))
        batch.context_lens.append(end)
        batch.block_tables.append(blocks + [0] * (num_blocks - len(blocks)))
        if chunk.samples:
            batch.logit_rows.append(len(batch.token_ids) - 1)
    return batch


class Scheduler:
    """Decides which tokens of which sequences each step computes.

    Every step is `chunks = schedule()`, then a forward pass, then `commit(chunks, sampled)`.

    Attributes:
        waiting: sequences without blocks, the first to be admitted first.
        running: sequences with blocks. Both lists are in the order of arrival.
    """

    def __init__(self, blocks: BlockManager, max_tokens: int, max_sequences: int) -> None:  # given
        """Compute at most `max_tokens` tokens a step, and run at most `max_sequences` at a time."""
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:  # given
        """Queue a sequence.

        Raises ValueError if len(prompt) + max_new_tokens tokens need more blocks than there are
        (`num_blocks`, not `num_free`). The last token is never stored; it is counted all the same.
        """
        longest = len(sequence.prompt) + sequence.max_new_tokens
        needed = num_blocks_for(longest, self.blocks.block_size)
        if needed > self.blocks.num_blocks:
            raise ValueError(
                f"{sequence.name} may need {needed} blocks, and there are {self.blocks.num_blocks}"
            )
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:  # given
        """Take a sequence out of its list, waiting or running, and free its blocks.

        `commit` does it for those that have ended. A sequence may also be given up, between a
        commit and the next schedule.
        """
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.free(sequence.block_ids)
        sequence.block_ids = []

    def admit(self) -> bool:
        """Move the first waiting sequence to the running ones, with blocks for all of its tokens.

        It shares the blocks of the longest known prefix, whose tokens count as computed, and gets
        new ones for the rest. A shared block that was free is not free any more, so it lowers
        `num_free` too. Returns False, without any change, if too few blocks are free for the rest.
        `schedule` looks at `max_sequences`, not this method.
        """
        sequence = self.waiting[0]
        shared = self.blocks.find_prefix(sequence.tokens)
        for block in shared:
            self.blocks.share(block)
        missing = num_blocks_for(len(sequence.tokens), self.blocks.block_size) - len(shared)
        if missing > self.blocks.num_free:
            self.blocks.free(shared)
            return False
        sequence.block_ids = shared + self.blocks.allocate(missing)
        sequence.num_computed = len(shared) * self.blocks.block_size
        self.running.append(self.waiting.pop(0))
        return True

    def plan(self, sequence: Sequence, count: int) -> Chunk:  # given
        """Return the chunk of a sequence's next `count` tokens, and register the blocks it fills.

        The chunk starts at `num_computed`. The sequence is not changed: `commit` adds `count` to
        `num_computed` after the forward pass. Every block that is full after the step is registered
        now: a sequence that is admitted later in the same step can share it.
        """
        end = sequence.num_computed + count
        self.blocks.register_prefix(sequence.block_ids, sequence.tokens[:end])
        return Chunk(sequence, sequence.num_computed, count)

    def preempt(self, sequence: Sequence) -> None:  # given
        """Take the blocks of a running sequence away and make it the first that waits.

        It keeps its tokens, also the generated ones, and is computed again from the first token.
        """
        self.running.remove(sequence)
        self.blocks.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.insert(0, sequence)

    def make_room(self, sequence: Sequence) -> bool:
        """Make sure that a running sequence has a slot for the position `num_computed`.

        There the token that was sampled last will be stored; it is in `tokens` already. If no block
        of the sequence has that position, the sequence gets one block more. While no block is free
        for it, the last running sequence is preempted. Returns False if that was the sequence
        itself.
        """
        needed = num_blocks_for(sequence.num_computed + 1, self.blocks.block_size)
        if len(sequence.block_ids) >= needed:
            return True
        while self.blocks.num_free == 0:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        sequence.block_ids += self.blocks.allocate(1)
        return True

    def schedule(self) -> list[Chunk]:
        """Plan a step of at most `max_tokens` tokens.

        First the running sequences that decode, one token each; then as much as fits of the prompts
        of the other running ones; then waiting ones are admitted, strictly in order, while tokens,
        blocks and `max_sequences` allow it.
        """
        chunks: list[Chunk] = []
        left = self.max_tokens
        for sequence in [one for one in self.running if one.is_decoding]:
            is_running = sequence in self.running  # not preempted by an earlier one
            if left > 0 and is_running and self.make_room(sequence):
                chunks.append(self.plan(sequence, 1))
                left -= 1
        for sequence in [one for one in self.running if not one.is_decoding]:
            count = min(sequence.num_uncomputed, left)
            if count > 0:
                chunks.append(self.plan(sequence, count))
                left -= count
        while self.waiting and left > 0 and len(self.running) < self.max_sequences:
            if not self.admit():
                break
            sequence = self.running[-1]
            count = min(sequence.num_uncomputed, left)
            chunks.append(self.plan(sequence, count))
            left -= count
        return chunks

    def commit(self, chunks: list[Chunk], sampled: list[int]) -> list[Sequence]:
        """Take over the results of a step and return the sequences that have ended.

        Adds the number of tokens of each chunk to its sequence's `num_computed`. A sequence ends
        when a stop token is sampled, or after `max_new_tokens` tokens; it is finished.

        Args:
            chunks: the plan of the step.
            sampled: the next token of each chunk that samples, in the order of the chunks.
        """
        ended = []
        results = iter(sampled)
        for chunk in chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.count
            if samples:
                token = next(results)
                sequence.tokens.append(token)
                if token in sequence.stop_token_ids or (
                    len(sequence.output) == sequence.max_new_tokens
                ):
                    self.finish(sequence)
                    ended.append(sequence)
        return ended
