"""What step 9 must do."""

from random import Random
from types import ModuleType
from typing import Any

from nanovllm.learn.checking import Case, require
from nanovllm.learn.steps.step09_scheduler.classroom import (
    BLOCK_SIZE,
    Classroom,
    generate_alone,
    prompt,
    shown,
)
from nanovllm.learn.steps.step09_scheduler.mistakes import MISTAKES

__all__ = ("CASES", "MISTAKES")


def _admits(module: ModuleType) -> object:
    """The first 24 tokens of all prompts are the same, and are cached in free blocks."""
    room = Classroom(module, num_blocks=9)
    cached = room.blocks.allocate(3)
    room.blocks.register_prefix(cached, prompt("z", 24, 24))
    room.blocks.free(cached)
    waiting = [room.new(name, length, shared=24) for name, length in (("a", 40), ("b", 25))]
    waiting += [room.new("c", 25)]
    waiting[1].tokens += [1] * 8  # it has run before, and was preempted
    room.scheduler.waiting += [*waiting, room.new("d", 49, shared=24)]
    for sequence in waiting:
        text = f"admit() with {sequence.name} as the first"
        was_admitted = room.call(text, "admit")
        room.note_sequence(sequence, f"after {text}")
        if not was_admitted:
            break
    return room.calls


def _does_not_admit(module: ModuleType) -> object:
    """Six blocks are free, three of them cached; the sequence would share these and need four."""
    room = Classroom(module, num_blocks=8)
    cached = room.blocks.allocate(3)
    room.blocks.register_prefix(cached, prompt("z", 24, 24))
    room.put("a", 16, 8)
    room.blocks.free(cached)
    sequence = room.new("b", 50, shared=24)
    room.scheduler.waiting += [sequence, room.new("c", 1)]
    room.call("admit() with b as the first", "admit")
    room.note_sequence(sequence, "after admit()")
    return room.calls


def _has_room(module: ModuleType) -> object:
    """The sequence a decodes at the positions 15, 16 and 17."""
    room = Classroom(module)
    sequence = room.put("a", 16, 15)
    room.put("b", 9, 8)
    for position in (15, 16, 17):
        text = f"make_room(a) for position {position}"
        room.call(text, "make_room", sequence)
        room.note_sequence(sequence, f"after {text}")
        sequence.num_computed += 1
        sequence.tokens.append(position)
    return room.calls


def _makes_room(module: ModuleType) -> object:
    """No block is free; the last one that runs goes, which in the end is the sequence itself."""
    room = Classroom(module, num_blocks=7)
    sequences = [room.put(name, 16, 15) for name in "abc"]
    room.put("d", 8, 7)
    room.call("make_room(a), which has room", "make_room", sequences[0])
    for number in (1, 0, 1, 1):
        sequence = sequences[number]
        while sequence.num_computed < len(sequence.block_ids) * BLOCK_SIZE:
            sequence.num_computed += 1
            sequence.tokens.append(600)
        text = f"make_room({sequence.name})"
        if sequence in room.scheduler.running:
            room.call(text, "make_room", sequence)
        room.note_sequence(sequence, f"after {text}")
    return room.calls


def _plan_of(room: Classroom) -> object:
    room.call("schedule()", "schedule")
    return room.calls


def _mixed_step(module: ModuleType) -> object:
    """Two sequences decode, the prompt of a third is computed in part, and others wait."""
    room = Classroom(module)
    for name, length, computed in (("a", 11, 10), ("b", 26, 16), ("c", 4, 3)):
        room.put(name, length, computed)
    room.scheduler.waiting += [room.new("d", 11), room.new("e", 30), room.new("f", 2)]
    return _plan_of(room)


def _long_prompt(module: ModuleType) -> object:
    """What one prompt leaves of the budget is less than the next one needs."""
    room = Classroom(module)
    for name, length, computed in (("a", 11, 10), ("b", 60, 24)):
        room.put(name, length, computed)
    room.scheduler.waiting += [room.new("c", 5)]
    return _plan_of(room)


def _decodes_alone(module: ModuleType) -> object:
    room = Classroom(module, max_tokens=3)
    for name in "abcd":
        room.put(name, 11, 10)
    return _plan_of(room)


def _small_budget(module: ModuleType) -> object:
    plans = {}
    for budget in (3, 5):
        room = Classroom(module, max_tokens=budget)
        for name in "abcd":
            room.put(name, 11, 10)
        room.put("e", 20, 8)
        room.scheduler.waiting += [room.new("f", 5)]
        plans[f"schedule() with a budget of {budget}"] = shown(room.scheduler.schedule())
    return plans


def _few_sequences(module: ModuleType) -> object:
    room = Classroom(module, max_sequences=3)
    room.put("a", 11, 10)
    room.scheduler.waiting += [room.new(name, 3) for name in "bcde"]
    return _plan_of(room)


def _strict_order(module: ModuleType) -> object:
    """The first that waits needs four blocks of three; the second would have room."""
    room = Classroom(module, num_blocks=5)
    room.put("a", 11, 10)
    room.scheduler.waiting += [room.new("b", 30), room.new("c", 3)]
    return _plan_of(room)


def _without_blocks(module: ModuleType) -> object:
    room = Classroom(module, num_blocks=8)
    for name in "abcd":
        sequence = room.put(name, 16, 15)
        if name in "ab":
            sequence.tokens.append(600)
            sequence.num_computed += 1
    return _plan_of(room)


def _commits(module: ModuleType) -> object:
    room = Classroom(module)
    sequences = [room.put("a", 11, 10, 2), room.put("b", 26, 16), room.put("c", 9, 0)]
    sequences += [room.put("d", 7, 6, 9), room.put("e", 12, 11, 9), room.put("f", 11, 10, 3)]
    sequences[4].stop_token_ids = frozenset({44})
    sequences[1].stop_token_ids = frozenset(sequences[1].prompt[-1:])
    counts = (1, 5, 9, 1, 1, 1)
    chunks = [
        module.Chunk(sequence, sequence.num_computed, count)
        for sequence, count in zip(sequences, counts, strict=True)
    ]
    ended = room.scheduler.commit(chunks, [11, 33, 43, 44, 45])
    room.calls.add("commit of a to f", [sequence.name for sequence in ended])
    for sequence in sequences:
        room.note_sequence(sequence, "after commit")
    room.note("commit", None)
    return room.calls


def _classroom(module: ModuleType) -> object:
    room = Classroom(module)
    room.add("a", 10, 6)
    room.add("b", 50, 3)
    room.step("the first step")
    room.add("c", 5, 9)
    return room.run()


def _preemptions(module: ModuleType) -> object:
    room = Classroom(module, num_blocks=8)
    for name, length in (("a", 14), ("b", 20), ("c", 17)):
        room.add(name, length, 20)
    return room.run()


def _shared_prompt(module: ModuleType) -> object:
    room = Classroom(module)
    for name in "abc":
        room.add(name, 21, 5, shared=18)
    return room.run()


def _random_arrivals(module: ModuleType) -> object:
    """Twelve times 14 sequences arrive at random, and each must be served as if it were alone."""
    for seed in range(12):
        random, room = Random(seed), Classroom(module, num_blocks=11, max_sequences=5)
        arrivals = sorted(random.randrange(40) for _ in range(14))
        sequences: list[Any] = []
        for step in range(600):
            while arrivals and arrivals[0] <= step:
                arrivals.pop(0)
                name, length = chr(97 + len(sequences)), random.randint(1, 60)
                sequence = room.new(
                    name,
                    length,
                    random.randint(1, 25),
                    stop_token_ids=frozenset(random.sample(range(1000), 40)),
                    shared=min(length, random.choice([0, 8, 20, 60])),
                )
                room.scheduler.add(sequence)
                sequences.append(sequence)
            chunks = room.step(f"step {step} of schedule {seed}")
            _require_limits(room, chunks, step)
            if not arrivals and not room.scheduler.waiting and not room.scheduler.running:
                break
        left = [one.name for one in (*room.scheduler.waiting, *room.scheduler.running)]
        require(not left, f"{', '.join(left)} did not end within 600 steps")
        require(
            room.blocks.num_free == 11, f"{room.blocks.num_free} of 11 blocks are free at the end"
        )
        for sequence in sequences:
            alone = generate_alone(sequence)
            require(
                sequence.output == alone,
                f"{sequence.name} was preempted {sequence.num_preemptions} times; its output is "
                f"{sequence.output}, and alone it is {alone}",
            )
    return None


def _require_limits(room: Classroom, chunks: list[Any], step: int) -> None:
    scheduler = room.scheduler
    total = sum(chunk.count for chunk in chunks)
    require(total <= 24, f"step {step} has {total} tokens, and the budget is 24")
    names = [chunk.sequence.name for chunk in chunks]
    require(len(set(names)) == len(names), f"step {step} has a sequence twice: {names}")
    require(len(scheduler.running) <= 5, f"{len(scheduler.running)} sequences run after {step}")
    is_idle = not scheduler.waiting and not scheduler.running
    require(chunks or is_idle, f"step {step} computes nothing, although sequences are left")


CASES = (
    Case(
        "an admitted sequence has blocks for its tokens and shares the known ones",
        _admits,
        lesson="The first 24 tokens of a and b are in three free, cached blocks of 8; c begins "
        "otherwise. b was preempted and has 33 tokens.",
    ),
    Case(
        "without enough blocks nothing changes",
        _does_not_admit,
        lesson="b has 50 tokens, which need seven blocks. Six are free, and three of these are "
        "cached with its first 24 tokens.",
    ),
    Case(
        "a block is added when the next token needs it",
        _has_room,
        lesson="Position 15 is the last of the second block, 16 the first of the third.",
    ),
    Case(
        "without a free block the last one that runs is preempted",
        _makes_room,
        lesson="Of seven blocks a, b and c hold two each, and d the last.",
    ),
    Case(
        "one step decodes, goes on with a prompt and admits others",
        _mixed_step,
        lesson="a (11 tokens) and c (4) decode, 10 tokens of b are left, and d (11 tokens), e (30) "
        "and f (2) wait. The budget is 24.",
    ),
    Case(
        "a prompt that does not fit is computed in part",
        _long_prompt,
        lesson="a decodes, 36 tokens of b are left, and c waits. The budget is 24.",
    ),
    Case(
        "decoding sequences keep the budget too",
        _decodes_alone,
        lesson="a, b, c and d decode. The budget is 3.",
    ),
    Case(
        "what decoding leaves of the budget goes to a prompt",
        _small_budget,
        lesson="a, b, c and d decode, 12 tokens of e are left, and f waits. The "
        "budget is 3, then 5.",
    ),
    Case(
        "not more than max_sequences run",
        _few_sequences,
        lesson="a decodes, and b, c, d and e wait. max_sequences is 3.",
    ),
    Case(
        "nobody overtakes the first that waits",
        _strict_order,
        lesson="a decodes. Three blocks are free; b needs four, and c one.",
    ),
    Case(
        "the preempted are not computed in the same step",
        _without_blocks,
        lesson="a, b, c and d decode and hold two blocks each, which are all. Now a and b "
        "need a third.",
    ),
    Case(
        "results go to their sequences, which end in time",
        _commits,
        lesson="The chunk of b ends within its prompt, so the results belong to a, c, d, e and f. "
        "a ends with its second token of 2, and e with the stop token 44. The last token of b's "
        "prompt is a stop token of b, but it was not generated.",
    ),
    Case(
        "the classroom: a, b and then c",
        _classroom,
        lesson="a has 10 tokens and generates 6, b has 50 and generates 3. After the first step c "
        "comes with 5 and generates 9. Page 9 says what the classroom is.",
    ),
    Case(
        "the classroom with too few blocks",
        _preemptions,
        lesson="There are 8 blocks. a has 14 tokens, b 20 and c 17; each generates 20.",
    ),
    Case(
        "three sequences with one prompt",
        _shared_prompt,
        lesson="The first 18 of 21 tokens are the same.",
    ),
    Case("168 sequences that arrive at random", _random_arrivals),
)
