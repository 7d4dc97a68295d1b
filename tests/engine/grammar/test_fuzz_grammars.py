"""A short run of the fuzzer of grammars, always with the same seed."""

from tests.support.fuzz_grammars import run


def test_whatever_is_asked_for_is_compiled_or_refused() -> None:
    counts = run(11, count=60)
    assert counts["refused"] > 5
    assert counts["finished"] + counts["followed"] > 5
    assert counts["on a path"] > 5
