"""What goes wrong in step 8."""

from nanovllm.learn.checking import Mistake

_UNCACHE = """            if block in self._hash_of:
                del self._block_of[self._hash_of.pop(block)]
"""
_CHECK = """            if self._counts[block] == 0:
                raise ValueError(f"block {block} is free already")
"""
_COUNT_CHECK = """        if count > self.num_free:
            raise ValueError(f"{count} blocks are needed, and {self.num_free} are free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
"""
_HASHED = 'parent + array("q", tokens).tobytes()'
_DIGEST = f"blake2b({_HASHED}, digest_size=16).digest()"
_INDEX = "block_ids[position // block_size] * block_size + position % block_size"

MISTAKES = (
    Mistake(
        "rounded down",
        "The number of blocks is rounded down: the tokens of the last, partly full block have no "
        "place.",
        "return -(-tokens // block_size)",
        "return tokens // block_size",
    ),
    Mistake(
        "one block too many",
        "tokens // block_size + 1 counts one block too many where the last one is exactly full.",
        "return -(-tokens // block_size)",
        "return tokens // block_size + 1",
    ),
    Mistake(
        "slot is the position",
        "The slot is the position in the sequence, as if it had the blocks 0, 1, 2, ... Look the "
        "block up in block_ids.",
        _INDEX,
        "position",
    ),
    Mistake(
        "one block for all",
        "All tokens go to the block of the first one. Divide each position by block_size: behind a "
        "block's end the next one in block_ids begins.",
        _INDEX,
        "block_ids[start // block_size] * block_size + position - start // block_size * block_size",
    ),
    Mistake(
        "blocks counted from the start",
        "The first token is taken to be in block_ids[0]. It is in block_ids[start // block_size]: "
        "earlier chunks have filled the blocks before it.",
        "block_ids[position // block_size]",
        "block_ids[(position - start) // block_size]",
    ),
    Mistake(
        "offset missing",
        "The offset in the block, position % block_size, is not added: all tokens of a block are "
        "stored in its first slot.",
        _INDEX,
        "block_ids[position // block_size] * block_size",
    ),
    Mistake(
        "block id not multiplied",
        "The offset is added to the block id itself. Each block before it has block_size slots: "
        "block id * block_size + offset.",
        _INDEX,
        "block_ids[position // block_size] + position % block_size",
    ),
    Mistake(
        "block and offset swapped",
        "Block and offset are swapped. divmod(slot, block_size) gives the block first.",
        "blocks, offsets = np.divmod(",
        "offsets, blocks = np.divmod(",
    ),
    Mistake(
        "slot used as a block id",
        "A slot is not a block id: pool[slot] would be a whole block. divmod(slot, block_size) "
        "gives block and offset.",
        "    pool[blocks, offsets] = rows",
        "    pool[np.array(slots)] = rows[:, None]",
    ),
    Mistake(
        "slots used as block ids",
        "Slots are not block ids: pool[slots] would be whole blocks. np.divmod(slots, block_size) "
        "gives the blocks and the offsets.",
        "    pool[blocks, offsets] = rows",
        "    pool[np.array(slots)] = rows",
    ),
    Mistake(
        "neighbours assumed",
        "The blocks are read one behind the other from the first on, but a sequence's blocks may "
        "be anywhere: index the pool with all of block_ids.",
        "pool[np.array(block_ids, dtype=np.int64)]",
        "pool[(np.arange(len(block_ids)) + block_ids[0]) % len(pool)]",
    ),
    Mistake(
        "order of the table lost",
        "The blocks are read in the order of their ids. The order of block_ids is that of the "
        "tokens.",
        "pool[np.array(block_ids, dtype=np.int64)]",
        "pool[np.sort(np.array(block_ids, dtype=np.int64))]",
    ),
    Mistake(
        "rows of nobody",
        "All rows of the last block are returned, also those that no token of the sequence has "
        "written. Cut at num_tokens.",
        "blocks.reshape(-1, *pool.shape[2:])[:num_tokens]",
        "blocks.reshape(-1, *pool.shape[2:])",
    ),
    Mistake(
        "hash without parent",
        "The hash does not depend on the block before it. Keys and values do: 2 2 1 1 would find "
        "the blocks of 1 1 2 2, computed at other positions and after other tokens.",
        _HASHED,
        'array("q", tokens).tobytes()',
    ),
    Mistake(
        "ids joined without a separator",
        "The ids are joined as text, so 1, 23 and 12, 3 have the same hash. Give each id the same "
        "number of bytes, or put a separator between them.",
        _HASHED,
        'parent + "".join(map(str, tokens)).encode()',
    ),
    Mistake(
        "ids cut to a byte",
        "Only the lowest byte of each id is hashed, so 1 and 257 are the same.",
        _HASHED,
        "parent + bytes(token % 256 for token in tokens)",
    ),
    Mistake(
        "each id made one byte",
        "bytes(tokens) takes numbers up to 255 only, and ids go beyond. "
        'array("q", tokens).tobytes() makes 8 bytes of each.',
        _HASHED,
        "parent + bytes(tokens)",
    ),
    Mistake(
        "a list hashed",
        "blake2b takes bytes, and `parent` is of the type bytes too. Make bytes of the list first: "
        'array("q", tokens).tobytes().',
        _HASHED,
        "parent + tokens",
    ),
    Mistake(
        "Python's own hash",
        "Python's `hash` is not the same in every process: that of bytes begins with a random "
        "number. Use blake2b, which depends on the bytes alone.",
        _DIGEST,
        "str(hash((parent, tuple(tokens)))).zfill(20).encode()",
    ),
    Mistake(
        "order of the tokens lost",
        "The hash does not depend on the order of the tokens.",
        _HASHED,
        'parent + array("q", sorted(tokens)).tobytes()',
    ),
    Mistake(
        "leak when allocation fails",
        "A call that fails keeps the blocks that it has taken before it noticed: nobody will ever "
        "free them. Compare `count` with num_free first.",
        _COUNT_CHECK,
        """        taken = []
        for _ in range(count):
            if not self._free:
                raise ValueError("no block is free")
            taken.append(self._free.popitem(last=False)[0])
""",
    ),
    Mistake(
        "fewer than asked for",
        "Where too few blocks are free, those that are left are returned. The caller would write "
        "to blocks that it does not have: raise ValueError.",
        _COUNT_CHECK,
        """        count = min(count, self.num_free)
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
""",
    ),
    Mistake(
        "taken from the end",
        "The last free block is taken, which is the one that was used last. Take the first: "
        "popitem(last=False).",
        "taken = [self._free.popitem(last=False)[0]",
        "taken = [self._free.popitem()[0]",
    ),
    Mistake(
        "double free",
        "A block that is free already can be freed again, so the count falls below 0, or the "
        "block is free twice and goes to two sequences. Raise ValueError.",
        _CHECK,
        "",
    ),
    Mistake(
        "stale name after reuse",
        "allocate leaves the hash of a block that is handed out. Its contents are overwritten, and "
        "whoever finds it by the old hash reads the tokens of another.",
        _UNCACHE,
        "",
    ),
    Mistake(
        "old hash kept",
        "allocate removes the hash from `_block_of` and not from `_hash_of`. The block looks "
        "cached for ever, and cannot be registered again.",
        "self._hash_of.pop(block)",
        "self._hash_of[block]",
    ),
    Mistake(
        "a freed block forgets its name",
        "free removes the block's hash. The contents are still there: whoever asks the same "
        "question a second later should find them. Remove the hash in allocate.",
        "                self._free[block] = None\n",
        "                self._free[block] = None\n"
        "                self._block_of.pop(self._hash_of.pop(block, b''), None)\n",
    ),
    Mistake(
        "second block takes the name",
        "A second block with the same contents takes the hash away from the first. The first has "
        "holders, keep it: then the second is freed and reused early.",
        "if block not in self._hash_of and block_hash not in self._block_of:",
        "if block not in self._hash_of:",
    ),
    Mistake(
        "find raises",
        "find must return None for a hash that is not cached: `.get(block_hash)`.",
        "return self._block_of.get(block_hash)",
        "return self._block_of[block_hash]",
    ),
    Mistake(
        "a block gets two hashes",
        "register gives another hash to a block that is cached already, so it can be found by "
        "both. allocate removes only one of them.",
        "if block not in self._hash_of and block_hash not in self._block_of:",
        "if block_hash not in self._block_of:",
    ),
    Mistake(
        "contents lost before empty blocks are used",
        "A freed block without a hash goes to the end of the free blocks, so cached ones are "
        "overwritten before it. Nothing can be found in it: put it in front.",
        "                    self._free.move_to_end(block, last=False)",
        "                    pass",
    ),
    Mistake(
        "share without counting",
        "share does not count the new holder. The block is free when the first of them ends, and "
        "the other one reads what a third writes.",
        "        self._counts[block] += 1",
        "        pass",
    ),
    Mistake(
        "shared block left in the free list",
        "A free block that is shared stays among the free blocks, and allocate hands it out while "
        "it is held.",
        "            del self._free[block]",
        "            pass",
    ),
    Mistake(
        "free ignores sharers",
        "free makes a block free although others hold it. Only when the count is 0 is it free.",
        "            self._counts[block] -= 1",
        "            self._counts[block] = 0",
    ),
    Mistake(
        "freed in the wrong order",
        "The first block of a prompt is overwritten before its last. Without the first none of the "
        "others can be found, and more prompts share the first: free in reverse order.",
        "for block in reversed(block_ids):",
        "for block in block_ids:",
    ),
    Mistake(
        "uncached blocks freed forwards",
        "The blocks that are not cached go to the front in forward order, so the last of them is "
        "handed out first. Go through all blocks from the last to the first.",
        "for block in reversed(block_ids):",
        "for block in sorted(\n"
        "            reversed(block_ids),\n"
        "            key=lambda one: -1 if one in self._hash_of else block_ids.index(one),\n"
        "        ):",
    ),
    Mistake(
        "most recently used evicted",
        "A freed block with a hash goes to the front of the free blocks: what was used last is "
        "overwritten first. It is the likeliest to be asked for again: put it at the end.",
        "                if block not in self._hash_of:\n                    self._free",
        "                if True:\n                    self._free",
    ),
    Mistake(
        "partly filled block registered",
        "The last block is registered although it is not full. The next tokens will be written to "
        "it, and its hash does not have them.",
        "range(len(tokens) // size)",
        "range(num_blocks_for(len(tokens), size))",
    ),
    Mistake(
        "parent not passed on",
        "Every block is registered as if it were the first. Give hash_block the hash of the block "
        "before it.",
        "self.register(block_ids[index], parent)",
        'self.register(block_ids[index], hash_block(b"", tokens[index * size :][:size]))',
    ),
    Mistake(
        "nothing left to compute",
        "The whole prompt is found in the cache. The logits of its last token are not in the "
        "cache, and the next token comes from them: leave one token at least.",
        "range((len(tokens) - 1) // size)",
        "range(len(tokens) // size)",
    ),
    Mistake(
        "a gap is skipped",
        "After a block that is not found, a later one is taken, but block i of the result must "
        "have the tokens of block i. Stop at the first that is missing.",
        "                break",
        "                continue",
    ),
    Mistake(
        "block 0 taken for none",
        "Block 0 is a block, and `not 0` is true: compare with None.",
        "            if block is None:",
        "            if not block:",
    ),
    Mistake(
        "shared while looking",
        "find_prefix shares the blocks. Who only asks would hold them for ever: the caller shares.",
        "            found.append(block)",
        "            self.share(block)\n            found.append(block)",
    ),
)
