"""Admission: no order of events exceeds a limit, and counts stay consistent."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm.engine.admission import MAX_RETRY_S, Admission, RequestSize, Reservation, total_size
from nanovllm.errors import InvalidRequestError, QueueFullError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def reserve(
    admission: Admission, *sizes: tuple[int, int] | tuple[int, int, int], client: str = ""
) -> Reservation:
    return admission.reserve([RequestSize(*size) for size in sizes], client=client)


def totals(admission: Admission) -> RequestSize:
    return RequestSize(
        admission.choices.total, admission.tokens.total, admission.logprobs_bytes.total
    )


def test_both_limits_hold_to_the_last_token() -> None:
    admission = Admission(3, 100)
    reserve(admission, (2, 60))
    with pytest.raises(
        QueueFullError, match="2 unfinished requests and 2 more would pass the limit of 3"
    ):
        reserve(admission, (2, 1))
    with pytest.raises(
        QueueFullError, match="may need 60 tokens and 41 more would pass the limit of 100"
    ):
        reserve(admission, (1, 41))
    reserve(admission, (1, 40))
    assert totals(admission)[:2] == (3, 100)
    assert admission.stats().refused == {"requests": 1, "tokens": 1, "memory": 0}


def test_what_can_never_fit_is_told_so_also_when_nothing_is_reserved() -> None:
    admission = Admission(3, 100)
    with pytest.raises(InvalidRequestError, match="4 choices at once, the limit is 3"):
        admission.check(RequestSize(4))
    with pytest.raises(
        InvalidRequestError,
        match=r"may need 101 tokens, .* of 2 choices together, the limit is 100; lower max_tokens",
    ):
        admission.check(RequestSize(2, 101))
    assert admission.stats().refused == {"requests": 0, "tokens": 0, "memory": 0}, (
        "that is a wrong request and not a full queue"
    )


def test_all_parts_are_reserved_or_none() -> None:
    admission = Admission(10, 100)
    with pytest.raises(InvalidRequestError):
        reserve(admission, (1, 60), (1, 60))
    reserve(admission, (1, 20))
    with pytest.raises(QueueFullError):
        reserve(admission, (1, 50), (1, 40))
    assert totals(admission)[:2] == (1, 20)


def test_before_the_engine_is_loaded_only_choices_count() -> None:
    admission = Admission(2, None)
    admission.check(RequestSize(2, 10**9))


def test_a_newcomer_finds_room_beside_a_client_that_has_all_it_may() -> None:
    admission = Admission(40, 400, 400)
    held = reserve(admission, *[(1, 10, 10)] * 40, client="a")
    with pytest.raises(QueueFullError, match=r"40 unfinished requests and 1 more .* of 40 \("):
        reserve(admission, (1, 1), client="a")
    with pytest.raises(QueueFullError, match=r"may need 400 bytes and 1 more .* of 400 \("):
        reserve(admission, (0, 0, 1), client="a")
    reserve(admission, (8, 80), client="b")
    reserve(admission, (0, 0, 80), client="b").release()
    with pytest.raises(QueueFullError, match="of 40 of one client, who has 8, beside") as refused:
        reserve(admission, (8, 8), client="b")
    assert refused.value.retry_after_s >= 1
    held.release_prompt(39)
    with pytest.raises(QueueFullError, match="of one client, who has 39, beside others"):
        reserve(admission, (1, 1), client="a")  # until it leaves a fifth free
    for index in range(0, 39, 2):
        held.release_prompt(index)
    reserve(admission, (8, 8), client="b")


def retry_after(admission: Admission, choices: int, tokens: int) -> int:
    with pytest.raises(QueueFullError) as caught:
        admission.check(RequestSize(choices, tokens))
    assert f"try again in {caught.value.retry_after_s} s" in str(caught.value)
    return caught.value.retry_after_s


def test_when_to_try_again_follows_from_how_fast_room_becomes_free() -> None:
    clock = Clock()
    admission = Admission(100, 1000, clock=clock)
    held = [reserve(admission, (1, 10)) for _ in range(100)]
    for _ in range(10):
        clock.now_s += 1
        held.pop().release()
        reserve(admission, (1, 10))
    assert retry_after(admission, 1, 10) == 1, "one choice and ten tokens a second"
    assert retry_after(admission, 7, 0) == 7
    assert retry_after(admission, 1, 250) == 25
    assert retry_after(admission, 100, 1000) == MAX_RETRY_S
    for _ in range(40):
        clock.now_s += 0.5
        held.pop().release()
        reserve(admission, (1, 10))
    assert retry_after(admission, 30, 0) == 18, "50 in half a minute"


def test_where_nothing_becomes_free_it_takes_as_long_again() -> None:
    clock = Clock()
    admission = Admission(1, 10, clock=clock)
    clock.now_s += 500
    reserve(admission, (1, 10))
    assert retry_after(admission, 1, 1) == 1, "nothing is known yet"
    clock.now_s += 7.5
    assert retry_after(admission, 1, 1) == 8
    clock.now_s += 1000
    assert 1 <= retry_after(admission, 1, 1) <= MAX_RETRY_S


def test_time_without_work_does_not_count() -> None:
    clock = Clock()
    admission = Admission(2, 100, clock=clock)
    reserve(admission, (2, 2)).release()
    clock.now_s += 20
    both = reserve(admission, (1, 1), (1, 1))
    clock.now_s += 1
    both.release_prompt(0)
    assert retry_after(admission, 2, 0) == 1, "one a second, since it has been busy"


SIZES = st.lists(
    st.builds(RequestSize, st.integers(1, 4), st.integers(0, 30), st.integers(0, 40)), max_size=4
)


class AdmissionMachine(RuleBasedStateMachine):
    """Any order of reserving, refusing, releasing and time, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(8, 50, 60, clock=self.clock)
        self.held: list[tuple[Reservation, dict[int, RequestSize], int]] = []
        self.released: list[Reservation] = []

    @rule(sizes=SIZES)
    def reserve(self, sizes: list[RequestSize]) -> None:
        size, before = total_size(sizes), totals(self.admission)
        limits = RequestSize(8, 50, 60)
        fits_ever = all(one <= limit for one, limit in zip(size, limits, strict=True))
        together = zip(size, before, limits, strict=True)
        if all(one + held <= limit for one, held, limit in together):
            reservation = self.admission.reserve(sizes)
            assert reservation.unfinished == size
            self.held.append((reservation, dict(enumerate(sizes)), size.logprobs_bytes))
            return
        with pytest.raises(QueueFullError if fits_ever else InvalidRequestError) as caught:
            self.admission.reserve(sizes)
        assert 1 <= getattr(caught.value, "retry_after_s", 1) <= MAX_RETRY_S
        assert totals(self.admission) == before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_a_prompt(self, data: st.DataObject) -> None:
        reservation, sizes, _ = data.draw(st.sampled_from(self.held))
        index = data.draw(st.integers(0, 4))
        sizes.pop(index, None)
        reservation.release_prompt(index)
        assert reservation.unfinished == total_size(list(sizes.values()))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reservation, *_ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        reservation.release()
        self.released.append(reservation)

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        reservation = data.draw(st.sampled_from(self.released))
        reservation.release()
        reservation.release_prompt(0)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        unfinished = total_size([size for _, sizes, _ in self.held for size in sizes.values()])
        num_bytes = sum(held_bytes for *_, held_bytes in self.held)
        assert totals(self.admission) == (unfinished.choices, unfinished.tokens, num_bytes)
        assert unfinished.choices <= 8
        assert unfinished.tokens <= 50
        assert num_bytes <= 60
        assert len(self.admission._released) <= 32, "what is remembered stays small"  # noqa: SLF001


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_memory_is_held_until_the_response_is_written() -> None:
    admission = Admission(100, 1000, 100)
    first, second = reserve(admission, (1, 1, 60)), reserve(admission, (1, 1, 40))
    with pytest.raises(QueueFullError, match="may need 100 bytes and 1 more") as caught:
        reserve(admission, (1, 1, 1))
    assert caught.value.retry_after_s >= 1
    first.release_prompt(0)
    assert totals(admission) == (1, 1, 100)
    first.release()
    first.release()
    assert totals(admission) == (1, 1, 40)
    reserve(admission, (1, 1, 60))
    second.release()
    assert totals(admission) == (1, 1, 60)
    assert admission.stats().refused["memory"] == 1


def test_memory_that_there_never_is_is_the_requests_fault() -> None:
    admission = Admission(100, 1000, 100)
    with pytest.raises(InvalidRequestError, match="101 bytes, the limit is 100"):
        reserve(admission, (1, 1, 101))
    assert admission.stats().refused["memory"] == 0
