"""Bounds on what is looked at in a body: each fault that pydantic finds costs time and memory.

Pydantic collects all faults in one call that keeps the interpreter, so that a body of a million faults would stop the event loop for
seconds. Sizes are checked first instead.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, model_validator

MAX_FIELDS = 100  # more than there are to know; each unknown one costs an error of its own


class BoundedModel(BaseModel):
    """An object of a body, which is refused as a whole where it has too many fields."""

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """Count the fields before they are looked at."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields, the limit is {MAX_FIELDS}")
        return value


def at_most(limit: int) -> BeforeValidator:
    """Entries of a list or an object are counted before they are looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict | list) and len(value) > limit:
            raise ValueError(f"has {len(value)} entries, the limit is {limit}")
        return value

    return BeforeValidator(check)
