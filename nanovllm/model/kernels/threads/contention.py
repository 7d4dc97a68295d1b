"""The number of threads for a run while other programs take cores too.

With a core for each thread, all threads are best. When other programs take cores, a thread that is
descheduled with an item of work delays the others by a time slice, some milliseconds, and fewer
threads are often faster. The sign is time that threads sleep at barriers. A trial then measures
whether fewer threads are faster: runs use another number of threads for a moment, and their times
are compared with earlier runs. While fewer threads are used, trials of more threads follow at
intervals that double after each failure, so the loss is limited to a few per cent.

The number of threads changes no bit of a result.
"""

from dataclasses import dataclass

_STALLED = 0.06
"""Share of the threads' time that they may sleep at barriers before fewer threads are tried."""
_TRIAL_S = 0.06
_TRIAL_RUNS = 3
_GAIN = 0.97
"""A trial succeeds where its runs take less than this share of the time expected."""
_INTERVAL_S = 0.1
_MAX_INTERVAL_S = 3.0
_LOSS = 1 / 40
"""A failed trial is repeated when its loss is no more than this share of the time since."""
_HOPELESS, _HOPELESS_RUNS = 1.5, 6
"""A trial ends early when its time exceeds 1.5 times the expected, after 6 runs or one long run."""
_MAX_LOSS = 10.0
"""Upper bound of a trial's loss, as a multiple of the expected time: beyond it the process was
stopped."""
_MEMORY_S = 0.15
"""Time that averages cover."""


@dataclass(slots=True)
class _Average:
    """A moving average, weighted by the duration of each measurement."""

    value: float = 0.0
    seconds: float = 0.0

    def add(self, value: float, seconds: float) -> None:
        self.seconds = min(self.seconds + seconds, _MEMORY_S)
        self.value += (value - self.value) * min(seconds / self.seconds, 1.0)


@dataclass(slots=True)
class _Trial:
    """Runs with another number of threads: their time, and that expected of the present number."""

    threads: int
    runs: int = 0
    seconds: float = 0.0
    expected_s: float = 0.0


@dataclass(slots=True)
class _Schedule:
    """When fewer or more threads are tried next, and how many."""

    next_s: float = 0.0
    interval_s: float = _INTERVAL_S
    failures: int = 0

    def failed(self, now_s: float, loss_s: float = 0.0) -> None:
        self.failures += 1
        self.interval_s = min(2 * self.interval_s, _MAX_INTERVAL_S)
        self.next_s = now_s + max(self.interval_s, loss_s / _LOSS)

    def succeeded(self, now_s: float) -> None:
        self.failures = 0
        self.interval_s = _INTERVAL_S
        self.next_s = now_s + self.interval_s

    def pick(self, levels: list[int]) -> int:
        """Return the nearest level first, and after each failure the next one, cyclically."""
        return levels[self.failures % len(levels)]


class ThreadCount:
    """Chooses a number of threads from 1 to `max_threads`, for one caller at a time.

    Attributes:
        threads: the number of threads outside trials.
    """

    def __init__(self, max_threads: int) -> None:
        """Begin with all threads."""
        self._levels = sorted({1, max_threads // 2, max_threads - 1, max_threads} - {0})
        self.threads = max_threads
        self._costs: dict[tuple[str, int], _Average] = {}
        self._seen: set[tuple[str, int]] = set()
        self._stalled = _Average()
        self._trial: _Trial | None = None
        self._down, self._up = _Schedule(), _Schedule()
        self._key: tuple[str, int] = ("", 0)
        self._work = 0

    def choose(self, kind: str, work: int) -> int:
        """Return the number of threads for the next run.

        Args:
            kind: what the run computes.
            work: its work, in any unit that its time is about proportional to.
        """
        self._key, self._work = (kind, work.bit_length()), work
        if self._trial is not None and self._key in self._costs:
            return self._trial.threads
        return self.threads

    def record(self, threads: int, seconds: float, stalled_s: float, now_s: float) -> None:
        """Record the run that was last chosen for, which ended at `now_s`."""
        key, work = self._key, self._work
        self._key, self._work = ("", 0), 0
        if not work or seconds <= 0 or len(self._levels) == 1:
            return
        if key not in self._seen:  # it touched memory and code for the first time
            self._seen.add(key)
            return
        trial = self._trial
        if trial is not None and threads == trial.threads and key in self._costs:
            trial.runs += 1
            trial.seconds += seconds
            trial.expected_s += self._costs[key].value * work
            is_slow = trial.seconds > _HOPELESS * trial.expected_s
            is_long = trial.runs >= _HOPELESS_RUNS or trial.expected_s >= _TRIAL_S
            if (is_slow and is_long) or (trial.runs >= _TRIAL_RUNS and trial.seconds >= _TRIAL_S):
                self._decide(trial, now_s)
        elif threads == self.threads:
            self._costs.setdefault(key, _Average()).add(seconds / work, seconds)
            self._stalled.add(stalled_s / (seconds * threads), seconds)
            if trial is None:
                self._trial = self._next_trial(now_s)

    def _next_trial(self, now_s: float) -> _Trial | None:
        fewer = [level for level in reversed(self._levels) if level < self.threads]
        more = [level for level in self._levels if level > self.threads]
        if fewer and self._stalled.value > _STALLED and now_s >= self._down.next_s:
            return _Trial(self._down.pick(fewer))
        if more and now_s >= self._up.next_s:
            return _Trial(self._up.pick(more))
        return None

    def _decide(self, trial: _Trial, now_s: float) -> None:
        self._trial = None
        is_up = trial.threads > self.threads
        schedule, other = (self._up, self._down) if is_up else (self._down, self._up)
        if trial.seconds >= _GAIN * trial.expected_s:
            loss_s = min(trial.seconds - trial.expected_s, _MAX_LOSS * trial.expected_s)
            schedule.failed(now_s, loss_s)
            return
        self.threads = trial.threads
        self._costs.clear()
        self._stalled = _Average()
        schedule.succeeded(now_s)
        other.failed(now_s)
