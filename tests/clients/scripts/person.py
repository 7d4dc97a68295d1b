"""The form of an answer, for scripts whose client takes a pydantic model."""

from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person; both fields are bounded, since the small model would go on with a text or a number without end."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
