"""Checks of a plan of the reader's scheduler, before it is computed.

What a plan claims must hold: its chunks are the next tokens of running sequences within the budget,
every block is either free or held, and the tokens that count as computed are really in the blocks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from nanovllm.engine.scheduling.block_manager import BlockManager, hash_block
from nanovllm.engine.scheduling.request import Request
from nanovllm.errors import counted
from nanovllm.learn.guard import wrong

_MAX_STEPS = 256
"""Steps without a new token after which their number is compared with that of all tokens."""
_Pair: TypeAlias = tuple[Request, Any]
"""A request and its sequence in the reader's scheduler."""


class PlanCheck:
    """Checks the plans of one scheduler, step by step, and knows what the blocks hold."""

    def __init__(
        self,
        scheduler: Any,
        manager: Any,
        blocks: BlockManager,
        *,
        max_tokens: int,
        max_sequences: int,
    ) -> None:
        """Start with empty blocks.

        Args:
            scheduler, manager: the reader's scheduler and block manager.
            blocks: sizes of the KV cache.
            max_tokens, max_sequences: maximum of a step.
        """
        self._scheduler, self._schedule, self._manager = scheduler, scheduler.schedule, manager
        self._num_blocks, self._block_size = blocks.num_blocks, blocks.block_size
        self._max_tokens, self._max_sequences = max_tokens, max_sequences
        # Of each block: hash of the tokens before it, and the tokens in it.
        self._contents: dict[int, tuple[bytes, list[int]]] = {}
        self._num_idle = 0  # steps since the last new token

    def check(self, chunks: Any, pairs: Mapping[int, _Pair]) -> None:
        """Check a plan; raise ReadersFaultError for what is wrong.

        Args:
            chunks: what `schedule` returned.
            pairs: the unfinished requests and their sequences, by id() of the sequence.
        """
        if not isinstance(chunks, list | tuple):
            raise wrong(self._schedule, f"it returned a {type(chunks).__name__}, expected a list")
        if not chunks:
            raise wrong(
                self._schedule,
                f"it planned nothing, and {counted(len(pairs), 'sequence')} left unfinished",
            )
        running = self._check_lists(pairs)
        self._check_chunks(chunks, running, pairs)
        held = self._check_tables(running)
        self._check_free(held)
        lost = [self._take(chunk, pairs[id(chunk.sequence)][0]) for chunk in chunks]
        self._check_writes(chunks, running)
        for text in filter(None, lost):
            raise wrong(self._schedule, f"{text}, which it had; did `block_ids` change?")
        self._check_progress(chunks, pairs)

    def _check_lists(self, pairs: Mapping[int, _Pair]) -> list[Any]:
        """Check `waiting` and `running`; return the running sequences."""
        for name in ("running", "waiting"):
            found = getattr(self._scheduler, name, None)
            if not isinstance(found, Iterable):
                text = f"`{name}` is a {type(found).__name__}, expected a list"
                raise wrong(self._schedule, text)
        running, waiting = list(self._scheduler.running), list(self._scheduler.waiting)
        listed = Counter(id(sequence) for sequence in (*running, *waiting))
        for sequence in (*running, *waiting):
            if id(sequence) not in pairs:
                name = getattr(sequence, "name", sequence)
                raise wrong(
                    self._schedule, f"{name} has ended, and is still in `running` or `waiting`"
                )
            if listed[id(sequence)] > 1:
                raise wrong(self._schedule, f"{sequence.name} is twice in `running` and `waiting`")
        for key, (_, sequence) in pairs.items():
            if key not in listed:
                text = f"{sequence.name} has not ended, and is neither in `running` nor `waiting`"
                raise wrong(self._schedule, text)
        for sequence in waiting:
            if sequence.block_ids:
                raise wrong(self._schedule, f"{sequence.name} waits, and holds blocks")
        if len(running) > self._max_sequences:
            text = f"{len(running)} sequences run, the limit is {self._max_sequences}"
            raise wrong(self._schedule, f"{text} (max_sequences)")
        return running

    def _check_chunks(
        self, chunks: Sequence[Any], running: Sequence[Any], pairs: Mapping[int, _Pair]
    ) -> None:
        is_running, seen, total = {id(sequence) for sequence in running}, set(), 0
        for chunk in chunks:
            sequence = getattr(chunk, "sequence", None)
            key = id(sequence)
            if sequence is None or key not in pairs:
                raise wrong(self._schedule, f"it planned {chunk!r:.60}, not a chunk of a sequence")
            name, start, count = sequence.name, chunk.start, chunk.count
            if key in seen:
                raise wrong(self._schedule, f"{name} is planned twice in one step")
            if key not in is_running:
                raise wrong(self._schedule, f"{name} is planned, and is not in `running`")
            if start != sequence.num_computed:
                text = f"the chunk of {name} begins at {start}, and {sequence.num_computed} tokens"
                raise wrong(self._schedule, f"{text} are computed")
            if count < 1 or start + count > len(sequence.tokens):
                text = f"the chunk of {name} has {counted(count, 'token')} from {start}"
                raise wrong(self._schedule, f"{text}, and there are {len(sequence.tokens)}")
            seen.add(key)
            total += count
        if total > self._max_tokens:
            text = f"the step has {total} tokens, the budget is {self._max_tokens}"
            raise wrong(self._schedule, f"{text} (max_tokens)")

    def _check_tables(self, running: Sequence[Any]) -> set[int]:
        """Check the running sequences' blocks; return all that are held."""
        held: set[int] = set()
        for sequence in running:
            table = sequence.block_ids
            for block in table:
                if not isinstance(block, int | np.integer) or not 0 <= block < self._num_blocks:
                    text = f"{sequence.name} holds the block {block!r}"
                    raise wrong(self._schedule, f"{text}; blocks are 0 to {self._num_blocks - 1}")
            if len(set(table)) < len(table):
                raise wrong(self._manager.allocate, f"{sequence.name} holds a block twice: {table}")
            held.update(table)
        return held

    def _check_free(self, held: set[int]) -> None:
        """Check that every block is either free or held."""
        num_free = self._manager.num_free
        if num_free + len(held) != self._num_blocks:
            text = f"{num_free} blocks are free and {len(held)} held, of {self._num_blocks}"
            what = (
                "a block was not freed"
                if num_free + len(held) < self._num_blocks
                else ("a block is free and held at once")
            )
            raise wrong(self._manager.free, f"{text}: {what}")

    def _check_writes(self, chunks: Sequence[Any], running: Sequence[Any]) -> None:
        """Check that no block is written for one sequence and read by another as something else."""
        size = self._block_size
        holders: dict[int, list[tuple[Any, int]]] = defaultdict(list)
        for sequence in running:
            for index, block in enumerate(sequence.block_ids):
                holders[block].append((sequence, index))
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            for index in range(chunk.start // size, -(-end // size)):
                block = sequence.block_ids[index]
                for other, at in holders[block] if len(holders[block]) > 1 else ():
                    shares = at == index and other.num_computed >= (index + 1) * size
                    if other is not sequence and not shares:
                        text = f"block {block} was handed out twice: {sequence.name} writes to it"
                        raise wrong(self._manager.allocate, f"{text}, and {other.name} holds it")

    def _take(self, chunk: Any, request: Request) -> str:
        """Note what a chunk writes; check that the tokens before it are in its blocks.

        Returns what is lost of a sequence that ran before; raises ReadersFaultError for a wrong
        prefix of one that is admitted.
        """
        size, sequence, end = self._block_size, chunk.sequence, chunk.start + chunk.count
        lost, needed = "", -(-end // size)
        if len(sequence.block_ids) < needed:
            text = f"{sequence.name} needs {needed} blocks for {end} tokens"
            raise wrong(self._schedule, f"{text}, and holds {len(sequence.block_ids)}")
        for index in range(-(-chunk.start // size)):
            first = index * size
            length = min(size, chunk.start - first)
            parent, tokens = self._contents.get(sequence.block_ids[index], (b"", []))
            expected = self._hash(request, index), request.tokens[first : first + length]
            if (parent, tokens[:length]) != expected:
                lost = (
                    f"{sequence.name} counts {chunk.start} tokens as computed, but block "
                    f"{sequence.block_ids[index]} does not have those of its positions {first} to "
                    f"{first + length - 1}"
                )
                if request.num_computed_tokens != chunk.start:
                    raise wrong(self._manager.find_prefix, lost)
        for index in range(chunk.start // size, needed):
            first = index * size
            tokens = request.tokens[first : min(first + size, end)]
            self._contents[sequence.block_ids[index]] = self._hash(request, index), tokens
        return lost

    def _hash(self, request: Request, index: int) -> bytes:
        """Return the hash of all tokens before a request's block `index`."""
        size, hashes = self._block_size, request.block_hashes
        while len(hashes) < index:
            first = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.tokens[first : first + size]))
        return hashes[index - 1] if index else b""

    def _check_progress(self, chunks: Sequence[Any], pairs: Mapping[int, _Pair]) -> None:
        """Check that sequences get tokens, and are not preempted again and again."""
        self._num_idle = 0 if any(chunk.samples for chunk in chunks) else self._num_idle + 1
        if self._num_idle > _MAX_STEPS and self._num_idle > sum(
            len(request.tokens) for request, _ in pairs.values()
        ):
            raise wrong(
                self._schedule, f"no sequence got a token in the last {self._num_idle} steps"
            )
