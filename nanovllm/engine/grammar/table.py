"""The grammars of a pool by their keys, those that wait, and which of them makes way for another.

See nanovllm/shares.py for the rule. The least recently used come first.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator

from nanovllm.engine.grammar.states import GrammarState, PooledGrammar
from nanovllm.shares import FairQueue, Shares

_MAX_WITHOUT_WORKER = 512  # grammars without a worker whose first mask or error is kept


class GrammarTable:
    """Grammars by key."""

    def __init__(self) -> None:
        """Start empty."""
        self._grammars: OrderedDict[str, PooledGrammar] = OrderedDict()

    def __iter__(self) -> Iterator[PooledGrammar]:
        """Iterate over the grammars, which may be removed meanwhile."""
        return iter(list(self._grammars.values()))

    def get(self, key: str) -> PooledGrammar | None:
        """Return the grammar of a key, which becomes the most recently used."""
        if key in self._grammars:
            self._grammars.move_to_end(key)
        return self._grammars.get(key)

    def add(self, grammar: PooledGrammar) -> None:
        """Add a new grammar, and forget old ones that have no worker."""
        self._grammars[grammar.key] = grammar
        states = (GrammarState.EVICTED, GrammarState.FAILED)
        old = [one for one in self if one.state in states and not one.sequences]
        for one in old[: max(0, len(old) - _MAX_WITHOUT_WORKER)]:
            self.remove(one)

    def remove(self, grammar: PooledGrammar) -> None:
        """Forget a grammar; the next request for it compiles it again."""
        if self._grammars.get(grammar.key) is grammar:
            del self._grammars[grammar.key]

    @property
    def unsettled(self) -> list[PooledGrammar]:
        """The grammars that wait or compile for the first time."""
        return [grammar for grammar in self if not grammar.is_settled]

    def displaced(self, client: str) -> tuple[str, PooledGrammar] | None:
        """Return the client that makes way for a waiting grammar of `client`, and its newest.

        A grammar counts for each client whose sequences wait for it. None where no client does.
        """
        held = (each for grammar in self.unsettled for each in grammar.clients)
        largest = Shares(None, held).displaced(client)
        for grammar in reversed(self.unsettled):
            if grammar.state is GrammarState.WAITING and largest in grammar.clients:
                assert largest is not None
                return largest, grammar
        return None

    def evictable(self, client: str) -> PooledGrammar | None:
        """Return the compiled grammar that makes way for one of `client`; None if none does.

        Idle ones go first, then the newest in use of the client with most.
        """
        ready = [grammar for grammar in self if grammar.state is GrammarState.READY]
        idle = next((grammar for grammar in ready if not grammar.sequences), None)
        if idle is not None:
            return idle
        largest = Shares(None, (grammar.client for grammar in ready)).displaced(client)
        theirs = [grammar for grammar in ready if grammar.client == largest]
        return max(theirs, key=lambda grammar: grammar.since_s, default=None)


class CompileQueue:
    """The grammars that wait for a worker. Clients take turns in both of its parts.

    Attributes:
        parts: the quick grammars, which are compiled again, and the others.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.parts: tuple[FairQueue[PooledGrammar], ...] = (FairQueue(), FairQueue())

    def __iter__(self) -> Iterator[PooledGrammar]:
        """Iterate over the grammars, which may be removed meanwhile."""
        return iter([grammar for part in self.parts for grammar in part])

    def put(self, grammar: PooledGrammar) -> None:
        """Append a grammar, which waits from now on."""
        grammar.since_s = time.monotonic()
        self.parts[0 if grammar.is_quick else 1].put(grammar.client, grammar)

    def remove(self, grammar: PooledGrammar) -> None:
        """Remove a grammar, if it waits."""
        for part in self.parts:
            part.remove(grammar.client, grammar)
