"""Pictures of the course, one module a step with `draw() -> str`.

Run `python -m tools.course` in the repository to write them all.
"""
