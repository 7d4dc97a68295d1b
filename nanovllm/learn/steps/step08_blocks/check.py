"""What step 8 must do, and what goes wrong."""

import builtins
from random import Random
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.request import Request
from nanovllm.learn.checking import Calls, Case, require
from nanovllm.learn.steps.step08_blocks.mistakes import MISTAKES
from nanovllm.model.kv_cache import KVCache
from nanovllm.sampling_params import SamplingParams

__all__ = ("CASES", "MISTAKES")

_RANDOM = np.random.default_rng(8)
_POOL = _RANDOM.normal(size=(6, 4, 2, 3)).astype(np.float32)  # blocks, block_size, heads, head_dim
_ROWS = _RANDOM.normal(size=(5, 2, 3)).astype(np.float32)
_TABLE = [4, 1, 3]
_SLOTS = [7, 6, 13, 14, 4]
_GATHERS = {f"gather(pool, {_TABLE}, {count})": count for count in (1, 4, 6, 12)}


class _Recorder:
    """Calls a block manager and records what it returned, and the free blocks afterwards."""

    def __init__(self, manager: Any) -> None:
        self.manager, self.calls = manager, Calls()

    def __call__(self, method: str, *values: Any, label: str = "") -> Any:
        """Call a method; `label` is shown instead of the values."""
        text = f"{method}({label or ', '.join(map(repr, values))})"
        result: Any = None
        try:
            result = getattr(self.manager, method)(*values)
            if method == "find":
                shown: object = "nothing" if result is None else f"block {result}"
            elif isinstance(result, list):
                shown = list(result)
            else:
                shown = result if method in {"allocate", "find_prefix"} else "no error"
        except ValueError:
            shown = "ValueError"
        self.calls.add(text, {"": shown, "and then num_free": self.manager.num_free})
        return result


def _written(module: ModuleType) -> object:
    pool = _POOL.copy()
    module.write(pool, _SLOTS, _ROWS)
    return {"the pool after write": pool}


def _engine_written() -> object:
    pool = _POOL.copy()
    cache = KVCache(pool[None], pool[None])
    cache.write(0, np.array(_SLOTS), _ROWS, _ROWS)
    return {"the pool after write": pool}


def _gathered(module: ModuleType) -> object:
    return {text: module.gather(_POOL, _TABLE, count) for text, count in _GATHERS.items()}


def _engine_gathered() -> object:
    cache = KVCache(_POOL[None], _POOL[None])
    table = np.array(_TABLE)
    return {text: cache.gather(0, table, count)[0] for text, count in _GATHERS.items()}


def _hashes(module: ModuleType) -> object:
    first = module.hash_block(b"", [1, 2])
    require(isinstance(first, bytes), "the hash is not of the type bytes")
    require(len(first) >= 16, f"the hash has {len(first)} bytes, which can be equal by chance")
    others = {
        "other tokens": module.hash_block(b"", [1, 3]),
        "tokens in another order": module.hash_block(b"", [2, 1]),
        "the same tokens behind another block": module.hash_block(first, [1, 2]),
        "12, 3 instead of 1, 23": module.hash_block(b"", [12, 3]),
        "257 instead of 1": module.hash_block(b"", [257, 2]),
    }
    same = {"the same block": first == module.hash_block(b"", [1, 2])}
    seen = (first, module.hash_block(b"", [1, 23]))
    return same | {name: value not in seen for name, value in others.items()}


def _hashes_elsewhere(module: ModuleType) -> object:
    """Replace Python's `hash` for one call: it gives other values in every process."""
    first, own = module.hash_block(b"1" * 16, [1, 2]), hash
    vars(builtins)["hash"] = lambda value: own((value, "another process"))
    try:
        second = module.hash_block(b"1" * 16, [1, 2])
    finally:
        vars(builtins)["hash"] = own
    return {"the same hash in another process": first == second}


def _allocates(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(4, 2))
    for count in (1, 2, 2, 1, 1):
        call("allocate", count)
    return call.calls


def _frees(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(4, 2))
    call("allocate", 4)
    call("free", [1])
    call("free", [1])
    call("free", [2])
    call("allocate", 2)
    return call.calls


def _names(module: ModuleType) -> object:
    """The blocks 0 and 1 have the same contents."""
    first, second = b"1" * 16, b"2" * 16
    call = _Recorder(module.BlockManager(4, 2))
    call("find", first, label="hash 1")
    call("allocate", 2)
    call("register", 0, first, label="0, hash 1")
    call("register", 1, first, label="1, hash 1")
    call("find", first, label="hash 1")
    call("find", second, label="hash 2")
    return call.calls


def _finds(module: ModuleType) -> object:
    first, second = b"1" * 16, b"2" * 16
    call = _Recorder(module.BlockManager(4, 2))
    call("allocate", 2)
    call("register", 0, first, label="0, hash 1")
    call("register", 1, first, label="1, hash 1")
    call("find", first, label="hash 1")
    call("register", 0, second, label="0, hash 2")
    call("find", second, label="hash 2")
    call("free", [0, 1])
    call("find", first, label="hash 1")
    call("allocate", 3)
    call("allocate", 1)
    call("find", first, label="hash 1")
    call("register", 0, second, label="0, hash 2")
    call("find", second, label="hash 2")
    return call.calls


def _shares(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(4, 2))
    call("allocate", 2)
    call("register", 0, b"1" * 16, label="0, hash 1")
    call("share", 0)
    call("free", [0])
    call("free", [0])
    call("share", 0)
    call("allocate", 2)
    call("allocate", 1)
    call("free", [0])
    return call.calls


def _evicts(module: ModuleType) -> object:
    """Three blocks of one sequence and two of another are freed, then their memory is needed."""
    call = _Recorder(module.BlockManager(6, 2))
    for count in (3, 2):
        call("allocate", count)
    for block in range(5):
        call("register", block, bytes([block]) * 16, label=f"{block}, hash {block}")
    call("free", [0, 1, 2])
    call("free", [3, 4])
    call("allocate", 1)
    call("allocate", 1)
    call("share", 0)
    call("free", [0])
    for count in (2, 2):
        call("allocate", count)
    return call.calls


def _frees_uncached(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(6, 2))
    call("allocate", 5)
    for block in range(2):
        call("register", block, bytes([block]) * 16, label=f"{block}, hash {block}")
    call("free", [0, 1, 2, 3, 4])
    for count in (1, 1, 1, 1, 1):
        call("allocate", count)
    return call.calls


def _registers_prefix(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(4, 2))
    call("allocate", 3)
    call("register_prefix", [0, 1, 2], [1, 2, 3, 4, 5])
    first = module.hash_block(b"", [1, 2])
    call("find", first, label="hash of 1, 2")
    call("find", module.hash_block(first, [3, 4]), label="hash of 3, 4 after 1, 2")
    call("find", module.hash_block(b"", [3, 4]), label="hash of 3, 4 alone")
    second = module.hash_block(first, [3, 4])
    call("find", module.hash_block(second, [5]), label="hash of the 5, whose block is not full")
    return call.calls


def _finds_prefix(module: ModuleType) -> object:
    call = _Recorder(module.BlockManager(4, 2))
    call("allocate", 3)
    call("register_prefix", [0, 1, 2], [1, 2, 3, 4, 5, 6])
    call("free", [0, 1, 2])
    for tokens in ([1, 2, 3, 4, 9], [1, 2, 9, 9, 5], [9, 9, 3, 4, 5], [3, 4, 1, 2, 5], [1], []):
        call("find_prefix", tokens)
    call("find_prefix", [1, 2, 3, 4])  # the last token must be computed
    for block in (0, 2):
        call("share", block)
    call("allocate", 2)
    call("find_prefix", [1, 2, 3, 4, 5, 6, 7])  # block 1 is gone
    return call.calls


def _random_calls(manager: Any) -> Calls:
    """Make 300 random calls that are allowed."""
    random, call = Random(8), _Recorder(manager)
    held: list[list[int]] = []
    for _ in range(300):
        choice = random.randrange(4)
        number = random.randrange(12)
        name = bytes([number]) * 16
        if choice == 0 and manager.num_free >= 3:
            held.append(call("allocate", random.randint(1, 3)))
        elif choice == 1 and held:
            call("free", held.pop(random.randrange(len(held))))
        elif choice == 2 and held:
            call("register", random.choice(held)[0], name, label=f"..., hash {number}")
        elif choice == 3:
            block = call("find", name, label=f"hash {number}")
            if block is not None:
                call("share", block)
                held.append([block])
    return call.calls


def _prompts() -> list[list[int]]:
    """Return prompts of which many begin alike."""
    random = Random(4)
    roots = [[random.randrange(9) for _ in range(14)] for _ in range(3)]
    return [[*random.choice(roots)[: random.randrange(15)], random.randrange(9)] for _ in range(60)]


def _serves(module: ModuleType) -> object:
    """Serve prompts, at most three at a time, and note the blocks of each."""
    manager, calls = module.BlockManager(14, 4), Calls()
    held: list[list[int]] = []
    for number, tokens in enumerate(_prompts()):
        shared = manager.find_prefix(tokens)
        for block in shared:
            manager.share(block)
        block_ids = shared + manager.allocate(module.num_blocks_for(len(tokens), 4) - len(shared))
        manager.register_prefix(block_ids, tokens)
        calls.add(f"cached blocks of prompt {number}", len(shared))
        calls.add(f"blocks of prompt {number}", block_ids)
        held.append(block_ids)
        if len(held) == 3:
            manager.free(held.pop(number % 3))
    return calls


def _engine_serves() -> object:
    """Do the same with the engine's classes."""
    manager, calls = KVCacheManager(BlockManager(14, 4)), Calls()
    held: list[Request] = []
    for number, tokens in enumerate(_prompts()):
        request = Request(
            request_id=str(number),
            prompt_token_ids=tuple(tokens),
            sampling=SamplingParams(),
            max_new_tokens=1,
            seed=0,
        )
        manager.take_computed(request, ())
        calls.add(f"cached blocks of prompt {number}", len(request.block_ids))
        manager.allocate_slots(request, len(tokens) - request.num_computed_tokens)
        manager.cache_blocks(request, len(tokens))
        calls.add(f"blocks of prompt {number}", request.block_ids)
        held.append(request)
        if len(held) == 3:
            manager.free(held.pop(number % 3))
    return calls


def _keeps_count(module: ModuleType) -> object:
    """Make random calls and keep one's own books."""
    random, manager = Random(80), module.BlockManager(10, 2)
    held: list[list[int]] = []
    names: dict[int, bytes] = {}  # what is registered for each block
    for step in range(400):
        counts = [sum(block in one for one in held) for block in range(10)]
        used = sum(count > 0 for count in counts)
        require(
            manager.num_free + used == 10,
            f"after {step} calls {used} blocks are held and {manager.num_free} are free, of 10",
        )
        choice, number = random.randrange(4), random.randrange(8)
        name = bytes([number]) * 16
        if choice == 0 and manager.num_free:
            taken = list(manager.allocate(random.randint(1, manager.num_free)))
            in_use = [block for block in taken if counts[block] or taken.count(block) > 1]
            require(not in_use, f"allocate returned {in_use}, which are held")
            held.append(taken)
            for block in taken:
                names.pop(block, None)
        elif choice == 1 and held:
            manager.free(held.pop(random.randrange(len(held))))
        elif choice == 2 and held:
            block = random.choice(held)[-1]
            if name not in names.values():
                names.setdefault(block, name)
            manager.register(block, name)
        elif choice == 3:
            found = manager.find(name)
            known = next((block for block in names if names[block] == name), None)
            require(found == known, f"find returned {found} for the contents of block {known}")
            if found is not None:
                manager.share(found)
                held.append([found])
    return None


CASES = (
    Case(
        "number of blocks of size 4 for 1, 4, 5, 8 and 9 tokens",
        lambda module: [module.num_blocks_for(tokens, 4) for tokens in (1, 4, 5, 8, 9)],
        lambda: [1, 1, 2, 2, 3],
        "A block that is partly full is a block.",
    ),
    Case(
        "slots of the positions 2 to 8 in the blocks 4, 1, 3 of size 4",
        lambda module: module.slots(_TABLE, 2, 7, 4),
        lambda: [18, 19, 4, 5, 6, 7, 12],
        "Position 4 is the first of the second block, which is block 1: slot 1 * 4 + 0.",
    ),
    Case("rows are stored at their slots", _written, _engine_written),
    Case("rows are read in the order of the block table", _gathered, _engine_gathered),
    Case("a hash stands for a block and all before it", _hashes),
    Case("a hash is the same in every process", _hashes_elsewhere),
    Case(
        "allocate takes the free blocks in order",
        _allocates,
        lesson="There are four blocks. A call that asks for too many changes nothing.",
    ),
    Case(
        "freed blocks come back once",
        _frees,
        lesson="None of the four blocks is cached, so each is put in front when it is freed.",
    ),
    Case(
        "what is not cached is not found, and the first block keeps its hash",
        _names,
        lesson="The blocks 0 and 1 have the same hash 1. No block has the hash 2.",
    ),
    Case(
        "a registered block is found until its memory is used again",
        _finds,
        lesson="`_hash_of` and `_block_of` must always say the same.",
    ),
    Case(
        "a shared block is free when its last holder is gone",
        _shares,
        lesson="A block is in `_free` exactly when its count is 0.",
    ),
    Case(
        "what was used longest ago is overwritten first, the end of a prompt before its beginning",
        _evicts,
        lesson="One sequence has the blocks 0, 1, 2, another one 3 and 4. The first ends, then the "
        "second. Without its first block, nothing of a cached prompt can be found.",
    ),
    Case(
        "blocks that are not cached come back from the first to the last",
        _frees_uncached,
        lesson="One sequence has the blocks 0 to 4, of which 0 and 1 are cached. Block 5 is free.",
    ),
    Case(
        "the full blocks of a prompt are registered",
        _registers_prefix,
        lesson="Five tokens fill two blocks of two.",
    ),
    Case(
        "the longest known prefix is found",
        _finds_prefix,
        lesson="Three free blocks are cached, with the tokens 1 to 6.",
    ),
    Case(
        "300 random calls give what the engine's BlockManager gives",
        lambda module: _random_calls(module.BlockManager(12, 4)),
        lambda: _random_calls(BlockManager(12, 4)),
    ),
    Case("60 prompts get the blocks that the engine gives them", _serves, _engine_serves),
    Case("free + held = total, and a held block is never handed out", _keeps_count),
)
