"""Suggest the name that somebody may have meant: the nearest known one, or that of another API."""

import difflib
from collections.abc import Iterable

OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_length": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "grammar": "structured_outputs",
    "json_schema": "response_format",
    "guided_decoding": "structured_outputs",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "structured_outputs"
    ),
}
"""Names of sampling settings in other APIs and in older versions of vLLM."""


def suggest(name: str, known: Iterable[str], *, min_similarity: float = 0.6) -> str | None:
    """Return the known name that `name` may mean; None if there is none.

    It is the name in OTHER_NAMES, else the most similar one, else one that begins with `name`.
    Upper case does not count, nor do underscores, and dashes before a name.

    Args:
        name: what somebody wrote.
        known: the names that exist.
        min_similarity: of difflib, from 0 to 1; longer lists need a higher one.
    """
    by_plain = {_plain(one): one for one in known}
    plain = _plain(name)
    other = _plain(OTHER_NAMES.get(name, ""))
    near = difflib.get_close_matches(plain, by_plain, n=1, cutoff=min_similarity)
    longer = [one for one in by_plain if len(plain) > 2 and one.startswith(plain)]
    found = next((one for one in (other, *near, *longer) if one in by_plain), None)
    return None if found is None else by_plain[found]


def _plain(name: str) -> str:
    return name.replace("_", "-").lower().lstrip("-")
