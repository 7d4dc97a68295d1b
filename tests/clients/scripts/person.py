"""The form of an answer, for scripts whose client takes a pydantic model."""

from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person. Both fields are bounded, since the small model may never end a text or a number."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
