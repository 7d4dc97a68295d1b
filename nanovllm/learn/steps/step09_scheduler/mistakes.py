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
