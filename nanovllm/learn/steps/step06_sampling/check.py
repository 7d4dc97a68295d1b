"""What step 6 must do, and what goes wrong."""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case, require
from nanovllm.learn.steps.step06_sampling.mistakes import MISTAKES
from nanovllm.model.numpy_sampler import apply_filters, draw_token

__all__ = ("CASES", "MISTAKES")


def _random(vocab: int) -> np.ndarray:
    return 2 * np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)


_PAPER = np.log(np.array([1, 4, 2, 1], dtype=np.float32) / 8)
_SIXTEENTHS = np.log(np.array([1, 8, 4, 3], dtype=np.float32) / 16)
_TIES = np.array([1, 3, 2, 3, 2, 0], dtype=np.float32)
_TENTHS = np.log(np.array([6, 3, 1], dtype=np.float32) / 10)
_NOISE = np.random.default_rng(6).exponential(size=(20, 512))
_TINY = 1e-10


def _filtered(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Return what the engine's filters leave."""
    scores = logits.copy()
    apply_filters(scores, top_k=top_k, top_p=top_p, min_p=0.0)
    return scores


def _kept(scores: object) -> object:
    """Return the ids that a filter kept, and all values."""
    require(isinstance(scores, np.ndarray), "a filter must return an array, such as np.where(...)")
    return {"the ids that are kept": np.flatnonzero(np.asarray(scores) > -np.inf).tolist(),
            "the logits": scores}  # fmt: skip


def _top_k(logits: np.ndarray, k: int, name: str, lesson: str = "") -> Case:
    return Case(
        name,
        lambda module: _kept(module.filter_top_k(logits.copy(), k)),
        lambda: _kept(_filtered(logits, top_k=k)),
        lesson,
    )


def _top_p(logits: np.ndarray, values: list[float], name: str, lesson: str = "") -> Case:
    return Case(
        name,
        lambda m: {f"p = {p}:": _kept(m.filter_top_p(logits.copy(), p)) for p in values},
        lambda: {f"p = {p}:": _kept(_filtered(logits, top_p=p)) for p in values},
        lesson,
    )


def _draws(logits: np.ndarray, noises: np.ndarray, name: str, lesson: str = "") -> Case:
    return Case(
        name,
        lambda module: [module.draw(logits.copy(), noise.copy()) for noise in noises],
        lambda: [draw_token(logits, noise) for noise in noises],
        lesson,
    )


def _samples(name: str, temperature: float, top_k: int, top_p: float, lesson: str = "") -> Case:
    """Return a case of 20 tokens, which must be those of the engine."""
    logits = _random(512)

    def run(module: ModuleType) -> object:
        return [
            module.sample(
                logits.copy(), temperature=temperature, top_k=top_k, top_p=top_p, noise=noise.copy()
            )
            for noise in _NOISE
        ]

    def expected() -> object:
        scores = _filtered(logits / np.float32(temperature), top_k, top_p)
        return [draw_token(scores, noise) for noise in _NOISE]

    return Case(name, run, expected, lesson)


def _greedy_sample(module: ModuleType) -> object:
    noise = np.array([9, 9, 9, 0.01, 9, 9])
    return module.sample(_TIES, temperature=0.0, top_k=3, top_p=0.5, noise=noise)


def _keeps_input(module: ModuleType) -> object:
    """Return the logits after a call of each function."""
    noise = _NOISE[0, :16]
    settings = {"temperature": 0.5, "top_k": 4, "top_p": 0.5, "noise": noise}
    calls: dict[str, Callable[[np.ndarray], object]] = {
        "filter_top_k": lambda logits: module.filter_top_k(logits, 3),
        "filter_top_p": lambda logits: module.filter_top_p(logits, 0.5),
        "draw": lambda logits: module.draw(logits, noise),
        "sample": lambda logits: module.sample(logits, **settings),
    }
    after = {}
    for name, call in calls.items():
        logits = after[f"the logits after {name}"] = _random(16)
        call(logits)
    return after


CASES = (
    Case("the largest logit", lambda module: module.greedy(_PAPER), lambda: 1),
    Case(
        "two largest logits",
        lambda module: module.greedy(_TIES),
        lambda: 1,
        "Token 1 and token 3 tie. The rule must be fixed, or the text differs between runs.",
    ),
    _top_k(_PAPER, 2, "top-k: the two largest of four"),
    _top_k(_TIES, 3, "top-k: a tie with the third", "Tokens 2 and 4 are equally likely."),
    _top_k(_PAPER, 0, "top-k: 0 keeps all"),
    _top_k(_PAPER, 9, "top-k: more than there are keeps all"),
    _top_p(
        _SIXTEENTHS,
        [0.6, 0.9, 0.1],
        "top-p of the probabilities 1/16, 8/16, 4/16, 3/16",
        "For p = 0.6, 8/16 is too little and 12/16 enough; the most likely token is always kept.",
    ),
    _top_p(
        _PAPER,
        [0.8],
        "top-p: ties with the last one kept",
        "Tokens 0 and 3 are equally likely. For p = 0.8 one of them is enough; both are kept.",
    ),
    _top_p(_TIES, [0.35, 0.7, 0.9], "top-p: ties of other tokens"),
    _top_p(_random(512), [0.5, 0.9, 0.99], "top-p of 512 tokens"),
    _top_p(
        2 * _random(512),
        [1.0],
        "top-p: 1 keeps all 512 tokens",
        "A rounded sum of all probabilities may be a little above or below 1.",
    ),
    _draws(
        _TENTHS,
        np.array([[0.9, 0.3, 0.2], *_NOISE[1:, :3]]),
        "20 draws from the probabilities 0.6, 0.3, 0.1",
        "The times of the first draw are 0.9 / 0.6 = 1.5, 0.3 / 0.3 = 1 and 0.2 / 0.1 = 2, so "
        "token 1 is drawn.",
    ),
    _draws(
        np.zeros(4, dtype=np.float32),
        np.array([[1, 1, 1, 1], [2, 1, 3, 1.0]]),
        "draws with equal times",
        "Of equal ones the lowest id is drawn.",
    ),
    _draws(
        np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32),
        np.array([[_TINY, 2, _TINY, 3, _TINY], [_TINY, 3, _TINY, 2, _TINY]]),
        "a filtered token is never drawn",
    ),
    _draws(
        np.array([88, 90, 89], dtype=np.float32) * 10,
        np.array([[1, 1, 1], [_TINY, 20, 1], [_TINY, 20, 1e-4]]),
        "draws from large logits",
        "exp(710) is more than float64 can hold.",
    ),
    Case(
        "temperature 0",
        _greedy_sample,
        lambda: 1,
        "Nothing is divided and nothing is drawn.",
    ),
    Case("the logits are not changed", _keeps_input, lesson="The caller may report log p of them."),
    _samples("20 tokens at temperature 1", 1.0, 0, 1.0),
    _samples("20 tokens at temperature 0.5", 0.5, 0, 1.0),
    _samples("20 tokens at temperature 2 with top_k 50", 2.0, 50, 1.0),
    _samples("20 tokens at temperature 2 with top_p 0.5", 2.0, 0, 0.5),
    _samples("20 tokens with top_k 20 and top_p 0.8", 1.5, 20, 0.8),
)
