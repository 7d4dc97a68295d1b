"""Admission: no order of events exceeds a limit, and counts stay consistent."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm.engine.admission import MAX_RETRY_S, Admission, MemoryBudget, Reservation
from nanovllm.errors import InvalidRequestError, QueueFullError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_both_limits_hold_to_the_last_token() -> None:
    admission = Admission(3, 100)
    admission.reserve([(2, 60)])
    with pytest.raises(
        QueueFullError, match="2 requests are unfinished and 2 more would pass the limit of 3"
    ):
        admission.reserve([(2, 1)])
    with pytest.raises(
        QueueFullError, match="may need 60 tokens and 41 more would pass the limit of 100"
    ):
        admission.reserve([(1, 41)])
    admission.reserve([(1, 40)])
    assert (admission.choices, admission.tokens) == (3, 100)
    assert admission.stats().refused == {"requests": 1, "tokens": 1}


def test_what_can_never_fit_is_told_so_also_when_nothing_is_reserved() -> None:
    admission = Admission(3, 100)
    with pytest.raises(InvalidRequestError, match="4 choices at once, the limit is 3"):
        admission.check(4)
    with pytest.raises(
        InvalidRequestError,
        match=r"may need 101 tokens, .* of 2 choices together, the limit is 100; lower max_tokens",
    ):
        admission.check(2, 101)
    assert admission.stats().refused == {"requests": 0, "tokens": 0}, (
        "that is a wrong request and not a full queue"
    )


def test_all_parts_are_reserved_or_none() -> None:
    admission = Admission(10, 100)
    with pytest.raises(InvalidRequestError):
        admission.reserve([(1, 60), (1, 60)])
    admission.reserve([(1, 20)])
    with pytest.raises(QueueFullError):
        admission.reserve([(1, 50), (1, 40)])
    assert (admission.choices, admission.tokens) == (1, 20)


def test_before_the_engine_is_loaded_only_choices_count() -> None:
    admission = Admission(2, None)
    admission.check(2, 10**9)


def test_a_newcomer_finds_room_beside_a_client_that_has_all_it_may() -> None:
    admission, budget = Admission(40, 400), MemoryBudget(400)
    held = admission.reserve([(1, 10)] * 40, client="a")
    budget.hold(400, client="a")
    with pytest.raises(QueueFullError, match=r"40 requests are unfinished and 1 more .* of 40 \("):
        admission.reserve([(1, 1)], client="a")
    with pytest.raises(QueueFullError, match=r"may need 400 bytes and 1 more .* of 400 \("):
        budget.hold(1, client="a")
    admission.reserve([(8, 80)], client="b")
    budget.hold(80, client="b").release()
    with pytest.raises(QueueFullError, match="of 40 of one client, who has 8, beside") as refused:
        admission.reserve([(8, 8)], client="b")
    assert refused.value.retry_after_s >= 1
    held.pop().release()
    with pytest.raises(QueueFullError, match="of one client, who has 39, beside others"):
        admission.reserve([(1, 1)], client="a")  # until it leaves a fifth free
    for reservation in held[::2]:
        reservation.release()
    admission.reserve([(8, 8)], client="b")


def retry_after(admission: Admission, choices: int, tokens: int) -> int:
    with pytest.raises(QueueFullError) as caught:
        admission.check(choices, tokens)
    assert f"try again in {caught.value.retry_after_s} s" in str(caught.value)
    return caught.value.retry_after_s


def test_when_to_try_again_follows_from_how_fast_room_becomes_free() -> None:
    clock = Clock()
    admission = Admission(100, 1000, clock=clock)
    held = admission.reserve([(1, 10)] * 100)
    for _ in range(10):
        clock.now_s += 1
        held.pop().release()
        admission.reserve([(1, 10)])
    assert retry_after(admission, 1, 10) == 1, "one choice and ten tokens a second"
    assert retry_after(admission, 7, 0) == 7
    assert retry_after(admission, 1, 250) == 25
    assert retry_after(admission, 100, 1000) == MAX_RETRY_S
    for _ in range(40):
        clock.now_s += 0.5
        held.pop().release()
        admission.reserve([(1, 10)])
    assert retry_after(admission, 30, 0) == 18, "50 in half a minute"


def test_where_nothing_becomes_free_it_takes_as_long_again() -> None:
    clock = Clock()
    admission = Admission(1, 10, clock=clock)
    clock.now_s += 500
    admission.reserve([(1, 10)])
    assert retry_after(admission, 1, 1) == 1, "nothing is known yet"
    clock.now_s += 7.5
    assert retry_after(admission, 1, 1) == 8
    clock.now_s += 1000
    assert 1 <= retry_after(admission, 1, 1) <= MAX_RETRY_S


def test_time_without_work_does_not_count() -> None:
    clock = Clock()
    admission = Admission(2, 100, clock=clock)
    admission.reserve([(2, 2)])[0].release()
    clock.now_s += 20
    (first, _) = admission.reserve([(1, 1), (1, 1)])
    clock.now_s += 1
    first.release()
    assert retry_after(admission, 2, 0) == 1, "one a second, since it has been busy"


class AdmissionMachine(RuleBasedStateMachine):
    """Any order of reserving, refusing, releasing and time, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(8, 50, clock=self.clock)
        self.held: list[Reservation] = []
        self.released: list[Reservation] = []

    @rule(parts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), max_size=4))
    def reserve(self, parts: list[tuple[int, int]]) -> None:
        choices, tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
        before = self.admission.choices, self.admission.tokens
        fits_ever = choices <= 8 and tokens <= 50
        fits_now = before[0] + choices <= 8 and before[1] + tokens <= 50
        if fits_now:
            got = self.admission.reserve(parts)
            assert [(one.choices, one.tokens) for one in got] == parts
            self.held += got
            return
        with pytest.raises(QueueFullError if fits_ever else InvalidRequestError) as caught:
            self.admission.reserve(parts)
        assert 1 <= getattr(caught.value, "retry_after_s", 1) <= MAX_RETRY_S
        assert (self.admission.choices, self.admission.tokens) == before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reservation = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        reservation.release()
        self.released.append(reservation)

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        reservation = data.draw(st.sampled_from(self.released))
        reservation.release()

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        assert self.admission.choices == sum(one.choices for one in self.held) <= 8
        assert self.admission.tokens == sum(one.tokens for one in self.held) <= 50
        assert len(self.admission._released) <= 32, "what is remembered stays small"  # noqa: SLF001


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_memory_is_held_and_given_back_once() -> None:
    budget = MemoryBudget(100)
    first, second = budget.hold(60), budget.hold(40)
    with pytest.raises(QueueFullError, match="may need 100 bytes and 1 more") as caught:
        budget.hold(1)
    assert caught.value.retry_after_s >= 1
    first.release()
    first.release()
    assert budget.held_bytes == 40
    budget.hold(60)
    second.release()
    assert (budget.held_bytes, budget.num_refused) == (60, 1)


def test_memory_that_there_never_is_is_the_requests_fault() -> None:
    budget = MemoryBudget(100)
    with pytest.raises(InvalidRequestError, match="101 bytes, the limit is 100"):
        budget.hold(101)
    assert budget.num_refused == 0
