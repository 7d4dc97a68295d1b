"""What goes wrong in step 9."""

from nanovllm.learn.checking import Mistake
from nanovllm.learn.steps.step09_scheduler.plan_mistakes import PLAN_MISTAKES

_SHARE = """        for block in shared:
            self.blocks.share(block)
"""
_FIT = """        if missing > self.blocks.num_free:
            self.blocks.free(shared)
            return False
"""
_HAS_ROOM = """        if len(sequence.block_ids) >= needed:
            return True
"""
_ROOM = """        while self.blocks.num_free == 0:
            last = self.running[-1]
"""
_PREEMPTS = f"""{_ROOM}            self.preempt(last)
            if last is sequence:
                return False
"""

MISTAKES = (
    Mistake(
        "accepts what can never end",
        "A sequence that may need more blocks than there are is queued. When it runs alone and no "
        "block is free, it preempts itself again and again. Raise ValueError in add.",
        "if needed > self.blocks.num_blocks:",
        "if False:",
    ),
    Mistake(
        "room for the prompt alone",
        "add compares the prompt alone with the blocks. The generated tokens need blocks too.",
        "longest = len(sequence.prompt) + sequence.max_new_tokens",
        "longest = len(sequence.prompt)",
    ),
    Mistake(
        "last token not counted",
        "add counts one token less than len(prompt) + max_new_tokens. The last token is never "
        "stored, but it is counted all the same.",
        "longest = len(sequence.prompt) + sequence.max_new_tokens",
        "longest = len(sequence.prompt) + sequence.max_new_tokens - 1",
    ),
    Mistake(
        "add looks at the free blocks",
        "add compares with num_free. Blocks that others hold will be free later, and until then "
        "the sequence waits: compare with num_blocks.",
        "if needed > self.blocks.num_blocks:",
        "if needed > self.blocks.num_free:",
    ),
    Mistake(
        "exact fit refused",
        "A sequence that needs exactly all blocks is refused.",
        "if needed > self.blocks.num_blocks:",
        "if needed >= self.blocks.num_blocks:",
    ),
    Mistake(
        "last in, first out",
        "A new sequence is put in front of those that wait. It belongs behind them: append.",
        "self.waiting.append(sequence)",
        "self.waiting.insert(0, sequence)",
    ),
    Mistake(
        "blocks kept at the end",
        "The blocks of a finished sequence are not freed. Soon none are left.",
        "self.waiting).remove(sequence)\n        self.blocks.free(sequence.block_ids)\n",
        "self.waiting).remove(sequence)\n",
    ),
    Mistake(
        "block ids kept at the end",
        "The blocks of a finished sequence are freed, and it still lists them: set block_ids "
        "to [].",
        "else self.waiting).remove(sequence)\n        self.blocks.free(sequence.block_ids)\n"
        "        sequence.block_ids = []",
        "else self.waiting).remove(sequence)\n        self.blocks.free(sequence.block_ids)",
    ),
    Mistake(
        "finished but still listed",
        "A finished sequence stays in `running` or `waiting` and would be planned again.",
        "(self.running if sequence in self.running else self.waiting).remove(sequence)",
        "pass",
    ),
    Mistake(
        "only running ones can be given up",
        "finish looks in `running` alone. Whoever closes the page may still be waiting.",
        "(self.running if sequence in self.running else self.waiting).remove(sequence)",
        "self.running.remove(sequence)",
    ),
    Mistake(
        "no prefix shared",
        "The cached blocks of the prompt are not used; everything is computed again.",
        "shared = self.blocks.find_prefix(sequence.tokens)",
        "shared: list[int] = []",
    ),
    Mistake(
        "found but not shared",
        "The found blocks are used without share, so they are still free: the next call of "
        "allocate may hand them out to another, or to this very sequence.",
        _SHARE,
        "",
    ),
    Mistake(
        "shared blocks allocated again",
        "New blocks are taken for all tokens, also for those that have shared blocks.",
        "self.blocks.block_size) - len(shared)",
        "self.blocks.block_size)",
    ),
    Mistake(
        "all blocks compared with the free ones",
        "admit asks for as many free blocks as the sequence needs in all. The shared ones are "
        "there already: compare only those that are missing.",
        "if missing > self.blocks.num_free:",
        "if missing + len(shared) > self.blocks.num_free:",
    ),
    Mistake(
        "num_computed in blocks",
        "num_computed is a number of tokens, and len(shared) a number of blocks: multiply by "
        "block_size.",
        "len(shared) * self.blocks.block_size",
        "len(shared)",
    ),
    Mistake(
        "shared tokens computed again",
        "num_computed is 0 although the shared blocks have the first tokens. They would be "
        "computed again, and written to blocks that others read.",
        "sequence.num_computed = len(shared) * self.blocks.block_size",
        "sequence.num_computed = 0",
    ),
    Mistake(
        "blocks for the prompt alone",
        "admit takes blocks for the prompt alone. A sequence that was preempted has generated "
        "tokens too, which are computed again.",
        "missing = num_blocks_for(len(sequence.tokens),",
        "missing = num_blocks_for(len(sequence.prompt),",
    ),
    Mistake(
        "a chunk's blocks alone",
        "admit does not ask whether the blocks suffice. allocate raises ValueError, and the step "
        "is lost: return False before anything has changed.",
        _FIT,
        "",
    ),
    Mistake(
        "leak when admission fails",
        "Where the blocks do not suffice, the shared ones stay held: nobody will free them.",
        _FIT,
        _FIT.replace("            self.blocks.free(shared)\n", ""),
    ),
    Mistake(
        "free blocks counted before sharing",
        "The free blocks are counted before the shared ones are taken out of them, so a cached, "
        "free block counts twice: as shared, and as free.",
        "        missing = num_blocks_for(len(sequence.tokens), self.blocks.block_size) - "
        "len(shared)\n        if missing > self.blocks.num_free:",
        "        missing = num_blocks_for(len(sequence.tokens), self.blocks.block_size) - "
        "len(shared)\n        if missing > self.blocks.num_free + len(shared):",
    ),
    Mistake(
        "still waits after admission",
        "The admitted sequence stays in `waiting`, and is admitted again.",
        "self.running.append(self.waiting.pop(0))",
        "self.running.append(self.waiting[0])",
    ),
    Mistake(
        "positions restart in a chunk",
        "Every chunk starts at position 0. The second chunk of a prompt starts where the first one "
        "ended: at num_computed.",
        "return Chunk(sequence, sequence.num_computed, count)",
        "return Chunk(sequence, 0, count)",
    ),
    Mistake(
        "plan counts as computed",
        "plan changes num_computed; commit does that, after the forward pass.",
        "        return Chunk(sequence, sequence.num_computed, count)",
        "        sequence.num_computed = end\n        return Chunk(sequence, end - count, count)",
    ),
    Mistake(
        "nothing registered",
        "plan does not register the blocks that it fills: nobody will find them.",
        "        self.blocks.register_prefix(sequence.block_ids, sequence.tokens[:end])",
        "        pass",
    ),
    Mistake(
        "registered before it is computed",
        "plan registers all full blocks of the prompt, also those that later chunks compute. "
        "Whoever finds them reads what was there before. Stop at num_computed + count.",
        "sequence.tokens[:end]",
        "sequence.tokens",
    ),
    Mistake(
        "registered a step late",
        "plan registers the blocks of earlier chunks alone. A sequence that is admitted in the "
        "same step could share those of this chunk too: all keys of a batch are stored before "
        "any query reads them.",
        "sequence.tokens[:end]",
        "sequence.tokens[: end - count]",
    ),
    Mistake(
        "blocks kept at a preemption",
        "preempt does not free the blocks, so nothing is gained.",
        "        self.running.remove(sequence)\n        self.blocks.free(sequence.block_ids)\n",
        "        self.running.remove(sequence)\n",
    ),
    Mistake(
        "block ids kept at a preemption",
        "The blocks of a preempted sequence are freed, and it still lists them. When it is "
        "admitted again, it writes to blocks of others.",
        "        sequence.block_ids = []\n        sequence.num_computed = 0\n",
        "        sequence.num_computed = 0\n",
    ),
    Mistake(
        "computed count kept at a preemption",
        "num_computed stays although the blocks are gone. It is 0 until admit sets it.",
        "        sequence.num_computed = 0\n        sequence.num_preemptions",
        "        sequence.num_preemptions",
    ),
    Mistake(
        "output lost at a preemption",
        "The generated tokens are thrown away. They were streamed to the reader already, and "
        "would be streamed a second time: keep them, and compute them like a prompt.",
        "        sequence.num_preemptions += 1\n",
        "        sequence.num_preemptions += 1\n        sequence.tokens = list(sequence.prompt)\n",
    ),
    Mistake(
        "the preempted goes to the end",
        "A preempted sequence goes behind those that wait. They came later: with enough of them it "
        "would never run again. Insert it in front.",
        "self.waiting.insert(0, sequence)",
        "self.waiting.append(sequence)",
    ),
    Mistake(
        "preemption not counted",
        "num_preemptions is not increased.",
        "        sequence.num_preemptions += 1\n",
        "",
    ),
    Mistake(
        "block missing at a boundary",
        "make_room counts the blocks of the computed tokens. The next token is at the position "
        "num_computed, so there must be room for num_computed + 1.",
        "needed = num_blocks_for(sequence.num_computed + 1,",
        "needed = num_blocks_for(sequence.num_computed,",
    ),
    Mistake(
        "a block for a token that is not sampled yet",
        "make_room counts one token more than there are. The token that was sampled last is in "
        "`tokens` already: no + 1.",
        "needed = num_blocks_for(sequence.num_computed + 1,",
        "needed = num_blocks_for(len(sequence.tokens) + 1,",
    ),
    Mistake(
        "preempts without need",
        "make_room preempts another sequence although this one has room for its next token. Look "
        "first whether it needs a block.",
        _HAS_ROOM + _PREEMPTS,
        _PREEMPTS + _HAS_ROOM,
    ),
    Mistake(
        "a block for every token",
        "A block is allocated for every token. There is room until the last one is full.",
        _HAS_ROOM,
        "",
    ),
    Mistake(
        "preempts the first",
        "The first running sequence is preempted, which has waited longest and has most to "
        "compute again. Preempt the last: then the first always gets on, and all of them end.",
        _ROOM,
        _ROOM.replace("[-1]", "[0]"),
    ),
    Mistake(
        "preempts itself",
        "The sequence that needs a block is preempted. If it is the first, nobody gets on: take "
        "the last of `running`.",
        _ROOM,
        _ROOM.replace("self.running[-1]", "sequence"),
    ),
    Mistake(
        "goes on after its own preemption",
        "make_room gives a block to a sequence that it has just preempted, and returns True.",
        "            if last is sequence:\n                return False\n",
        "",
    ),
    *PLAN_MISTAKES,
)
