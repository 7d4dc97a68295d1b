"""What goes wrong in step 9."""

from nanovllm.learn.checking import Mistake

_SHARE = """        for block in shared:
            self.blocks.share(block)
"""
_FIT = """        if missing > self.blocks.num_free:
            self.blocks.free(shared)
            return False
"""
_ROOM = """        while self.blocks.num_free == 0:
            last = self.running[-1]
"""
_DECODES = """        for sequence in [one for one in self.running if one.is_decoding]:
            is_running = sequence in self.running  # not preempted by an earlier one
            if left > 0 and is_running and self.make_room(sequence):
                chunks.append(self.plan(sequence, 1))
                left -= 1
"""
_PROMPTS = """        for sequence in [one for one in self.running if not one.is_decoding]:
            count = min(sequence.num_uncomputed, left)
            if count > 0:
                chunks.append(self.plan(sequence, count))
                left -= count
"""
_ADMISSION = """        while self.waiting and left > 0 and len(self.running) < self.max_sequences:
"""
_NEW_CHUNK = """            sequence = self.running[-1]
            count = min(sequence.num_uncomputed, left)
"""
_ENDS = """                if token in sequence.stop_token_ids or (
                    len(sequence.output) == sequence.max_new_tokens
                ):
"""

MISTAKES = (
    Mistake(
        "accepts what can never end",
        "A sequence that needs more blocks than there are is queued. When it runs alone and no "
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
        "a block for every token",
        "A block is allocated for every token. There is room until the last one is full.",
        "        if len(sequence.block_ids) >= needed:\n            return True\n",
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
    Mistake(
        "decodes not first",
        "Prompts are planned before the decoding sequences. A long prompt then takes the budget "
        "of many steps, and nobody who is being answered sees a token meanwhile.",
        _DECODES + _PROMPTS,
        _PROMPTS + _DECODES,
    ),
    Mistake(
        "decodes or prompts",
        "A step either decodes or computes prompts. Continuous batching does both in one step: "
        "decoding needs little of the budget.",
        _PROMPTS + _ADMISSION,
        "        if chunks:\n            return chunks\n" + _PROMPTS + _ADMISSION,
    ),
    Mistake(
        "static batching",
        "Others are admitted only when nobody runs. Those that wait would wait for the longest "
        "answer: admit them in every step.",
        _ADMISSION,
        "        was_idle = not chunks\n" + _ADMISSION.replace("while", "while was_idle and"),
    ),
    Mistake(
        "budget without decodes",
        "The tokens of decoding sequences are not taken off the budget, so the step exceeds it.",
        "                left -= 1\n",
        "",
    ),
    Mistake(
        "budget without running prompts",
        "The tokens of the running prompts are not taken off the budget, so the step exceeds it.",
        _PROMPTS,
        _PROMPTS.replace("                left -= count\n", ""),
    ),
    Mistake(
        "budget without new prompts",
        "The tokens of admitted prompts are not taken off the budget, so the step exceeds it.",
        "            chunks.append(self.plan(sequence, count))\n            left -= count\n",
        "            chunks.append(self.plan(sequence, count))\n",
    ),
    Mistake(
        "a chunk as long as the prompt",
        "The whole prompt of an admitted sequence is planned, whatever the budget is. Take what is "
        "left of it: min(num_uncomputed, left).",
        _NEW_CHUNK,
        _NEW_CHUNK.replace("min(sequence.num_uncomputed, left)", "sequence.num_uncomputed"),
    ),
    Mistake(
        "a running prompt waits for room",
        "A running prompt is planned only where all of the rest fits the budget. One that is "
        "longer than the budget never gets on: take the part that fits.",
        "            if count > 0:\n",
        "            if count == sequence.num_uncomputed:\n",
    ),
    Mistake(
        "a chunk without tokens",
        "Where nothing is left of the budget, a running prompt is planned with 0 tokens. Leave it "
        "out of the step.",
        "            if count > 0:\n",
        "            if count >= 0:\n",
    ),
    Mistake(
        "decodes exceed the budget",
        "Decoding sequences are planned although nothing is left of the budget.",
        "if left > 0 and is_running and",
        "if is_running and",
    ),
    Mistake(
        "number of sequences not limited",
        "More than max_sequences run at a time.",
        _ADMISSION,
        _ADMISSION.replace(" and len(self.running) < self.max_sequences", ""),
    ),
    Mistake(
        "one sequence too many",
        "max_sequences + 1 sequences run at a time.",
        "len(self.running) < self.max_sequences",
        "len(self.running) <= self.max_sequences",
    ),
    Mistake(
        "overtaken in the queue",
        "A sequence that does not fit is set aside, and a later, shorter one is admitted. With "
        "enough short ones the long one never runs: stop at the first that does not fit.",
        "                break\n",
        "                self.waiting.append(self.waiting.pop(0))\n"
        "                if not self.admit():\n                    break\n",
    ),
    Mistake(
        "the preempted is planned",
        "A sequence that make_room has preempted for an earlier one is planned in the same step. "
        "Look whether it still runs.",
        "            is_running = sequence in self.running  # not preempted by an earlier one\n",
        "            is_running = True\n",
    ),
    Mistake(
        "samples before the prompt is complete",
        "Every chunk takes a sampled token, also one that ends in the middle of a prompt. Its last "
        "logits predict a token that is known. Only chunks that sample take a result.",
        "            if samples:\n                token = next(results)\n",
        "            token = next(results, None)\n            if token is not None:\n",
    ),
    Mistake(
        "results in the wrong order",
        "The sampled tokens are taken from the end, so sequences get each other's tokens.",
        "results = iter(sampled)",
        "results = iter(sampled[::-1])",
    ),
    Mistake(
        "a chunk counted as one token",
        "num_computed grows by 1 and not by the length of the chunk, so the context ends before "
        "the new tokens, and they are computed again.",
        "sequence.num_computed += chunk.count",
        "sequence.num_computed += 1",
    ),
    Mistake(
        "the sampled token counts as computed",
        "The sampled token is counted in num_computed. Its key and value do not exist until the "
        "next step computes it.",
        "                sequence.tokens.append(token)\n",
        "                sequence.tokens.append(token)\n"
        "                sequence.num_computed = len(sequence.tokens)\n",
    ),
    Mistake(
        "off by one in max_tokens",
        "A sequence ends one token after max_new_tokens.",
        "len(sequence.output) == sequence.max_new_tokens",
        "len(sequence.output) > sequence.max_new_tokens",
    ),
    Mistake(
        "one token too few",
        "A sequence ends one token before max_new_tokens.",
        "len(sequence.output) == sequence.max_new_tokens",
        "len(sequence.output) >= sequence.max_new_tokens - 1",
    ),
    Mistake(
        "the prompt counts as output",
        "max_new_tokens is compared with all tokens. It limits those that were generated.",
        "len(sequence.output) == sequence.max_new_tokens",
        "len(sequence.tokens) >= sequence.max_new_tokens",
    ),
    Mistake(
        "stop tokens ignored",
        "A stop token does not end the sequence.",
        _ENDS,
        "                if len(sequence.output) == sequence.max_new_tokens:\n",
    ),
    Mistake(
        "ended but not finished",
        "commit returns the ended sequence without finishing it: it holds its blocks and is "
        "planned again.",
        "                    self.finish(sequence)\n",
        "",
    ),
)
