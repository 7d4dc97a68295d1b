"""Two English texts in the public domain, for experiments without a network.

grimm.txt  the first tales of Jacob and Wilhelm Grimm, in the translation of 1823: to learn from
alice.txt  the first two chapters of Alice's Adventures in Wonderland (Lewis Carroll, 1865), which
           the bundled model has not seen: to judge with

A paragraph is one line.
"""

from importlib.resources import files


def grimm() -> str:
    """Return the text to learn from."""
    return files(__name__).joinpath("grimm.txt").read_text(encoding="utf-8")


def alice() -> str:
    """Return the text to judge with."""
    return files(__name__).joinpath("alice.txt").read_text(encoding="utf-8")
