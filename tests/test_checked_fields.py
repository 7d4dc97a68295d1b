"""Fields are checked by their annotations, and described by the docstring of their class."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Interval

from nanovllm.checked_fields import check_fields, checked_fields
from nanovllm.errors import InvalidRequestError


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Attributes:
        count: how many, on
            two lines.
        share: what part.
    """

    count: Annotated[int, Interval(ge=1, le=3)] = 1
    share: Annotated[float, Interval(gt=0, le=1)] | None = None
    least: Annotated[int, Interval(ge=0)] = 0
    flag: bool = False
    side: Literal["left", "right"] = "left"
    text: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


def test_what_is_valid_is_kept_as_a_python_number() -> None:
    settings = Settings(count=np.int64(3), share=1)  # type: ignore[arg-type]
    assert (settings.count, settings.share) == (3, 1.0)
    assert (type(settings.count), type(settings.share)) == (int, float)
    assert Settings().share is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 4, "count is 4 but must be an integer, from 1 to 3"),
        ("count", True, "count is True but must be an integer, from 1 to 3"),
        ("count", None, "count is None but must be an integer, from 1 to 3"),
        ("share", 0, "share is 0 but must be a number, above 0 and up to 1"),
        ("share", float("nan"), "share is nan but must be a number"),
        ("least", -1, "least is -1 but must be an integer, at least 0"),
        ("flag", 1, "flag is 1 but must be true or false"),
        ("side", "up", "side is 'up' but must be 'left' or 'right'"),
    ],
)
def test_what_is_not_valid_is_named_with_its_bounds(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(InvalidRequestError, match=expected) as caught:
        Settings(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_a_field_says_what_its_class_says() -> None:
    fields = checked_fields(Settings)
    assert (fields["count"].help, fields["count"].default) == ("how many, on two lines.", 1)
    assert (fields["share"].is_optional, fields["text"].kind) == (True, None)
    assert fields["flag"].help == ""
