"""What goes wrong in `schedule` and `commit`, in step 9."""

from nanovllm.learn.checking import Mistake

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
_RESULTS = """        results = iter(sampled)
        for chunk in chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.count
            if samples:
                token = next(results)
"""

PLAN_MISTAKES = (
    Mistake(
        "decodes not first",
        "Prompts are planned before the decoding sequences. A long prompt then takes the budget "
        "of many steps, and nobody who is being answered sees a token meanwhile.",
        _DECODES + _PROMPTS,
        _PROMPTS + _DECODES,
    ),
    Mistake(
        "one loop for decodes and prompts",
        "The running sequences are planned in one loop, so a prompt comes before one that decodes. "
        "All that decode come before all prompts.",
        _DECODES + _PROMPTS,
        """        for sequence in list(self.running):
            count = min(sequence.num_uncomputed, left)
            if count > 0 and sequence in self.running:
                if not sequence.is_decoding or self.make_room(sequence):
                    chunks.append(self.plan(sequence, count))
                    left -= count
""",
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
        "chunks and results in pairs",
        "Chunks and results are taken in pairs. `sampled` has one token for each chunk that "
        "*samples*, so it is shorter: take the next one only where the chunk samples.",
        _RESULTS,
        """        for chunk, token in zip(chunks, sampled):
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.count
            if samples:
""",
    ),
    Mistake(
        "samples read too late",
        "`chunk.samples` compares the chunk with `tokens`, so it is false once a token has been "
        "appended. Read `chunk.samples` before you change the sequence.",
        _ENDS,
        _ENDS.replace("if token", "if chunk.samples and (token").replace("):", ")):"),
    ),
    Mistake(
        "a stop token in the prompt",
        "The last token is compared with the stop tokens although the chunk did not sample: then "
        "it is a token of the prompt. Compare only what was sampled.",
        _ENDS,
        _ENDS.replace("                if token", "            if sequence.tokens[-1]"),
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
