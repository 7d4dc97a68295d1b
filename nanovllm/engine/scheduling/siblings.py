"""Siblings: the n choices of one prompt, which compute the prompt once.

The first of them in the order computes the prompt. The others are admitted too, wait for it, and
then fork from it. The running ones are indexed by their prompt, so that a step takes a time that is
proportional to their number.
"""

from collections.abc import Collection, Iterable, Mapping

from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence


class _Family:
    """The running choices of one prompt.

    Attributes:
        members: the choices, by id.
        readers: those of them that have computed the whole prompt.
        first: the member that comes first in the order.
    """

    __slots__ = ("first", "members", "readers")

    def __init__(self, first: Request) -> None:
        self.members: dict[str, Request] = {}
        self.readers: dict[str, Request] = {}
        self.first = first


class Siblings:
    """The running choices of all prompts that have more than one. Single requests are ignored."""

    def __init__(self) -> None:
        """Start without choices."""
        self._families: dict[str, _Family] = {}

    def add(self, request: Request) -> None:
        """Add a request that starts to run."""
        if request.parent_id:
            family = self._families.setdefault(request.parent_id, _Family(request))
            family.members[request.request_id] = request
            family.first = min(family.first, request, key=_arrival)
            self.update(request)

    def update(self, request: Request) -> None:
        """Record whether a running request has computed its whole prompt."""
        if request.parent_id and request.num_computed_tokens >= request.num_prompt_tokens:
            self._families[request.parent_id].readers[request.request_id] = request

    def remove(self, request: Request) -> None:
        """Remove a request that no longer runs."""
        family = self._families.get(request.parent_id)
        if family is None:
            return
        del family.members[request.request_id]
        family.readers.pop(request.request_id, None)
        if not family.members:
            del self._families[request.parent_id]
        elif family.first is request:
            family.first = min(family.members.values(), key=_arrival)

    def readers(self, request: Request) -> Collection[Request]:
        """Return the running choices of a request's prompt that have computed the prompt."""
        family = self._families.get(request.parent_id)
        return () if family is None else family.readers.values()

    def first(self, request: Request) -> Request:
        """Return the first running choice of a running request's prompt."""
        return self._families[request.parent_id].first

    def must_wait(self, request: Request) -> bool:
        """Return whether a choice earlier in the order is still computing the prompt."""
        if not request.can_fork:
            return False
        family = self._families.get(request.parent_id)
        return family is not None and not family.readers and family.first.arrival < request.arrival

    def forks(self, planned: Mapping[str, PlannedSequence]) -> list[PlannedSequence]:
        """Return forks of the planned requests whose prompt is completed in this step.

        `planned` has the sequences of the step by request id.
        """
        found: dict[str, PlannedSequence] = {}
        for sequence in planned.values():
            source = sequence.request
            if source.parent_id and sequence.samples and source.num_output_tokens == 0:
                for other in self._families[source.parent_id].members.values():
                    is_fresh = other.num_output_tokens == 0 and other.request_id not in planned
                    if other is not source and other.can_fork and is_fresh:
                        found[other.request_id] = PlannedSequence.fork(other, source)
        return list(found.values())

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Assert that the index has exactly the choices among `running`."""
        expected = Siblings()
        for request in running:
            expected.add(request)
        assert self._families.keys() == expected._families.keys()
        for parent_id, family in self._families.items():
            other = expected._families[parent_id]
            assert (family.members, family.readers) == (other.members, other.readers)
            assert family.first is other.first


def _arrival(request: Request) -> int:
    return request.arrival
