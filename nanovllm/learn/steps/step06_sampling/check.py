"""What step 6 must do, and what goes wrong."""

from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case, Mistake, require
from nanovllm.model.numpy_sampler import apply_filters, draw_token


def _random(vocab: int) -> np.ndarray:
    return 2 * np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)


_PAPER = np.log(np.array([1, 4, 2, 1], dtype=np.float32) / 8)
_TIES = np.array([1, 3, 2, 3, 2, 0], dtype=np.float32)
_EIGHTHS = (np.arange(8) + 0.5) / 8
_NUMBERS = ((np.arange(20) * 0.618) % 1).tolist()
_BAD = {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "uniform": 0.99}


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


def _draws(logits: np.ndarray, numbers: list[float], name: str, lesson: str = "") -> Case:
    return Case(
        name,
        lambda module: [module.draw(logits.copy(), uniform) for uniform in numbers],
        lambda: [draw_token(logits, uniform) for uniform in numbers],
        lesson,
    )


def _samples(name: str, temperature: float, top_k: int, top_p: float, lesson: str = "") -> Case:
    """Return a case of 20 tokens, which must be those of the engine."""
    logits = _random(512)

    def run(module: ModuleType) -> object:
        return [
            module.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, uniform=number)
            for number in _NUMBERS
        ]

    def expected() -> object:
        scores = _filtered(logits / np.float32(temperature), top_k, top_p)
        return [draw_token(scores, number) for number in _NUMBERS]

    return Case(name, run, expected, lesson)


def _keeps_input(module: ModuleType) -> object:
    logits = _random(16)
    module.filter_top_k(logits, 3)
    module.filter_top_p(logits, 0.5)
    module.draw(logits, 0.5)
    module.sample(logits, temperature=0.5, top_k=4, top_p=0.5, uniform=0.5)
    return {"the logits after the calls": logits}


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
        _PAPER,
        [0.6, 0.8, 0.1, 1.0],
        "top-p of the probabilities 1/8, 4/8, 2/8, 1/8",
        "For p = 0.6, 4/8 is too little and 6/8 is enough; the most likely token is always kept.",
    ),
    _top_p(_TIES, [0.35, 0.7, 0.9], "top-p: ties with the last one kept"),
    _top_p(_random(512), [0.5, 0.9, 0.99], "top-p of 512 tokens"),
    _draws(_PAPER, _EIGHTHS.tolist(), "eight draws in steps of 1/8", "Token 1 has half of them."),
    _draws(
        np.zeros(4, dtype=np.float32),
        [0.0, 0.25, 0.5, 0.75],
        "draws at the borders of four equal tokens",
        "A number that is just the cumulative probability belongs to the next token.",
    ),
    _draws(
        np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32),
        [0.0, 0.5, 1 - 2**-53],
        "a filtered token is never drawn",
    ),
    _draws(
        np.array([88, 90, 89], dtype=np.float32) * 10,
        [0.0, 0.3, 0.6, 0.9],
        "draws from large logits",
        "exp(710) is more than float64 can hold.",
    ),
    Case(
        "temperature 0",
        lambda module: module.sample(_TIES, **_BAD),
        lambda: 1,
        "Nothing is divided and nothing is drawn.",
    ),
    _samples("20 tokens at temperature 1", 1.0, 0, 1.0),
    _samples("20 tokens at temperature 0.5", 0.5, 0, 1.0),
    _samples("20 tokens at temperature 2 with top_k 50", 2.0, 50, 1.0),
    _samples("20 tokens at temperature 0.5 with top_p 0.9", 0.5, 0, 0.9),
    _samples("20 tokens with top_k 20 and top_p 0.8", 1.5, 20, 0.8),
    Case("the logits are not changed", _keeps_input, lesson="The caller may report log p of them."),
)

_TOP_K = "return np.where(logits < threshold, np.float32(-np.inf), logits)"
_TOP_P = "return np.where(logits < ordered[last], np.float32(-np.inf), logits)"
_LAST = "last = min(np.searchsorted(cumulative, p * total), logits.size - 1)"
_CHOICE = 'index = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")'
_DRAW = "return draw(filter_top_p(filter_top_k(scores, top_k), top_p), uniform)"

MISTAKES = (
    Mistake(
        "last of equal logits",
        "Of two equal largest logits the last is returned. np.argmax of the logits returns the "
        "first; np.argsort(...)[-1] does not.",
        "return int(logits.argmax())",
        "return int(np.argsort(logits, kind='stable')[-1])",
    ),
    Mistake(
        "the k smallest",
        "The k smallest logits are kept. np.sort sorts upwards: the k-th largest is at [-k].",
        f"threshold = np.sort(logits)[-k]\n    {_TOP_K}",
        "threshold = np.sort(logits)[k - 1]\n"
        "    return np.where(logits > threshold, np.float32(-np.inf), logits)",
    ),
    Mistake(
        "one too many",
        "k + 1 tokens are kept. Of n sorted numbers the k-th largest is at [-k], which is [n - k].",
        "np.sort(logits)[-k]",
        "np.sort(logits)[-k - 1]",
    ),
    Mistake(
        "threshold not kept",
        "The k-th largest is removed too: `<=` where `<` is meant.",
        "np.where(logits < threshold,",
        "np.where(logits <= threshold,",
    ),
    Mistake(
        "zero instead of minus infinity",
        "Filtered logits are set to 0. A logit of 0 has the weight exp(0) = 1; minus infinity has "
        "the weight 0.",
        _TOP_K,
        "return np.where(logits < threshold, np.float32(0), logits)",
    ),
    Mistake(
        "ties cut",
        "Of the tokens that tie with the k-th, only some are kept, as np.argsort happens to order "
        "them. Compare with the k-th largest logit.",
        _TOP_K,
        "kept = np.argsort(-logits, kind='stable')[:k]\n"
        "    out = np.full_like(logits, -np.inf)\n"
        "    out[kept] = logits[kept]\n"
        "    return out",
    ),
    Mistake(
        "top_k 0 keeps one",
        "k = 0 means that nothing is filtered; here np.sort(logits)[-0], the smallest, or "
        "max(k, 1) was used.",
        "if not 0 < k < logits.size:\n        return logits.copy()",
        "k = min(max(k, 1), logits.size)",
    ),
    Mistake(
        "nothing left",
        "Tokens are kept while the sum is at most p, so the token that crosses p is removed; where "
        "the most likely token alone is above p, nothing is left. Keep the one that crosses p.",
        f"    {_LAST}\n",
        '    last = np.searchsorted(cumulative, p * total, side="right") - 1\n'
        "    if last < 0:\n"
        "        return np.full_like(logits, -np.inf)\n",
    ),
    Mistake(
        "crossing token dropped",
        "The token that crosses p is removed, so less than p is left. The kept tokens must sum to "
        "p or more.",
        _LAST,
        "last = max(np.searchsorted(cumulative, p * total) - 1, 0)",
    ),
    Mistake(
        "one token after the crossing one",
        "One token more than needed is kept: the sum was p or more before it.",
        _LAST,
        "last = min(np.searchsorted(cumulative, p * total) + 1, logits.size - 1)",
    ),
    Mistake(
        "least likely first",
        "The sum begins with the least likely token, so nearly all are kept. Sort downwards.",
        "ordered = -np.sort(-logits)  # the largest first",
        "ordered = np.sort(logits)",
    ),
    Mistake(
        "not sorted",
        "The sum runs in order of the ids. The nucleus is made of the most likely tokens: sort "
        "before the cumulative sum.",
        "ordered = -np.sort(-logits)  # the largest first",
        "ordered = logits",
    ),
    Mistake(
        "weights taken for probabilities",
        "exp(logit - max) is compared with p, but these weights do not sum to 1. Divide by their "
        "sum, or compare with p times the sum.",
        "np.searchsorted(cumulative, p * total)",
        "np.searchsorted(cumulative, p)",
    ),
    Mistake(
        "least likely kept",
        "The tokens above the threshold of top-p are removed; remove those below it.",
        _TOP_P,
        "return np.where(logits > ordered[last], np.float32(-np.inf), logits)",
    ),
    Mistake(
        "random number not scaled",
        "`uniform` is compared with a sum of weights that does not end at 1. Divide the weights by "
        "their sum, or multiply `uniform` by it.",
        "uniform * cumulative[-1]",
        "uniform",
    ),
    Mistake(
        "border to the token before",
        "A number equal to a cumulative probability gives the token before. uniform = 0 then gives "
        "the first token, even one of probability 0. The sum must be above `uniform`: "
        'side="right".',
        'side="right"',
        'side="left"',
    ),
    Mistake(
        "position returned",
        "The position among the tokens that are left is returned; it must be the token's id.",
        "return int(token_ids[min(index, token_ids.size - 1)])",
        "return int(min(index, token_ids.size - 1))",
    ),
    Mistake(
        "greedy instead of a draw",
        "The most likely token is returned, whatever `uniform` is.",
        _CHOICE,
        "index = weights.argmax()",
    ),
    Mistake(
        "maximum not subtracted",
        "The largest logit is not subtracted before np.exp, which overflows: the sum is inf.",
        "(logits[token_ids] - logits.max()).astype",
        "logits[token_ids].astype",
    ),
    Mistake(
        "temperature 0 divides",
        "Temperature 0 divides by 0. It means the greedy token.",
        "    if temperature == 0:\n        return greedy(logits)\n",
        "",
    ),
    Mistake(
        "temperature ignored",
        "The temperature is not applied.",
        "scores = logits / np.float32(temperature)",
        "scores = logits",
    ),
    Mistake(
        "temperature multiplied",
        "The logits are multiplied by the temperature; divide by it. A high temperature makes the "
        "probabilities more equal.",
        "scores = logits / np.float32(temperature)",
        "scores = logits * np.float32(temperature)",
    ),
    Mistake(
        "top_k not applied",
        "The result does not depend on top_k.",
        "filter_top_p(filter_top_k(scores, top_k), top_p)",
        "filter_top_p(scores, top_p)",
    ),
    Mistake(
        "top_p not applied",
        "The result does not depend on top_p.",
        "filter_top_p(filter_top_k(scores, top_k), top_p)",
        "filter_top_k(scores, top_k)",
    ),
    Mistake(
        "temperature after top_p",
        "top_p is applied to the logits before the temperature. The temperature changes the "
        "probabilities, and with them which tokens sum to p.",
        _DRAW,
        "kept = filter_top_p(filter_top_k(logits, top_k), top_p)\n"
        "    return draw(kept / np.float32(temperature), uniform)",
    ),
    Mistake(
        "top_p before top_k",
        "top_p is applied first. After top_k the probabilities that are left sum to 1 again, so "
        "the order matters: top_k, then top_p.",
        "filter_top_p(filter_top_k(scores, top_k), top_p)",
        "filter_top_k(filter_top_p(scores, top_p), top_k)",
    ),
    Mistake(
        "logits changed in place",
        "The logits themselves are changed (by /= or by assigning to them). Compute a new array.",
        _TOP_K,
        "logits[logits < threshold] = -np.inf\n    return logits",
    ),
)
