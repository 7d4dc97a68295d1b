"""What goes wrong in step 6."""

from nanovllm.learn.checking import Mistake

_TOP_K = "return np.where(logits < threshold, np.float32(-np.inf), logits)"
_TOP_P = "return np.where(logits < ordered[last], np.float32(-np.inf), logits)"
_LAST = "last = min(np.searchsorted(cumulative, p * total), logits.size - 1)"
_WEIGHTS = "weights = np.exp((logits - logits.max()).astype(np.float64))"
_WINNER = "return int(np.argmax(weights / noise))"
_DRAW = "return draw(filter_top_p(filter_top_k(scores, top_k), top_p), noise)"

_THRESHOLD = "threshold = np.sort(logits)[-k]"
_SORTED = "ordered = -np.sort(-logits)  # the largest first"
_ALL = "    if p >= 1:\n        return logits.copy()\n"
_GREEDY = "    if temperature == 0:\n        return greedy(logits)\n"
_SCALED = "scores = logits / np.float32(temperature)"


def _cut(order: str) -> str:
    """Return top-p by the ids in an order: of equal logits only some are kept."""
    return (
        f"order = {order}\n    last = np.searchsorted("
        "np.cumsum(np.exp(logits[order] - logits.max()), dtype=np.float64), p * total)\n"
        "    kept = order[: last + 1]\n"
        "    out = np.full_like(logits, -np.inf)\n"
        "    out[kept] = logits[kept]\n"
        "    return out"
    )


_TOP_P_TIES = (
    "Of the tokens that tie with the last one kept, only some are kept, as np.argsort happens to "
    "order them. Keep every logit that is at least the last one kept."
)
_PROBABILITIES = "np.exp(logits - logits.max()) / total"

MISTAKES = (
    Mistake(
        "value instead of the id",
        "The largest logit is returned. Return its place, the token's id: np.argmax.",
        "return int(logits.argmax())",
        "return logits.max()",
    ),
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
        "first ties cut",
        "Of the tokens that tie with the k-th, only some are kept, as np.argsort happens to order "
        "them. Compare with the k-th largest logit.",
        _TOP_K,
        "kept = np.argsort(logits, kind='stable')[-k:]\n"
        "    out = np.full_like(logits, -np.inf)\n"
        "    out[kept] = logits[kept]\n"
        "    return out",
    ),
    Mistake(
        "above the next one",
        "Tokens are kept where they are above the logit after the k-th. Where that one ties with "
        "the k-th, too few are left: keep those that are at least the k-th.",
        f"{_THRESHOLD}\n    {_TOP_K}",
        "threshold = np.sort(logits)[-k - 1]\n"
        "    return np.where(logits > threshold, logits, np.float32(-np.inf))",
    ),
    Mistake(
        "k values",
        "The k largest values are returned. Return an array of the shape of the logits, in which "
        "the other tokens have minus infinity.",
        _TOP_K,
        "return np.sort(logits)[::-1][:k]",
    ),
    Mistake(
        "top_k 0 has no largest",
        "k = 0 has no k-th largest logit. It means that nothing is filtered: return a copy.",
        "if not 0 < k < logits.size:\n        return logits.copy()\n    " + _THRESHOLD,
        "if k > logits.size:\n        return logits.copy()\n"
        "    threshold = np.sort(logits)[::-1][:k][-1]",
    ),
    Mistake(
        "k larger than the vocabulary",
        "There is no k-th largest where k is larger than the number of logits. Return a copy then.",
        "if not 0 < k < logits.size:",
        "if k == 0:",
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
        "top-p ties cut",
        _TOP_P_TIES,
        _TOP_P,
        _cut("np.argsort(-logits, kind='stable')"),
    ),
    Mistake(
        "first ties of top-p cut",
        _TOP_P_TIES,
        _TOP_P,
        _cut("np.argsort(logits, kind='stable')[::-1]"),
    ),
    Mistake(
        "nothing is above 1",
        "No rounded sum reaches p = 1, and np.argmax of an array without True is 0: one token is "
        "kept. "
        "Return a copy for p = 1.",
        f"{_ALL}    {_SORTED}",
        f"    {_SORTED}\n    if p >= 1:\n"
        "        return np.where(logits < ordered[0], np.float32(-np.inf), logits)",
    ),
    Mistake(
        "logits summed",
        "The logits are summed. Turn them into probabilities first (softmax).",
        "cumulative = np.cumsum(np.exp(ordered - ordered[0]), dtype=np.float64)\n    " + _LAST,
        "last = min(np.searchsorted(np.cumsum(ordered), p), logits.size - 1)",
    ),
    Mistake(
        "each probability compared with p",
        "Each probability alone is compared with p. Compare the sum of the most likely tokens: "
        "sort, then np.cumsum.",
        _TOP_P,
        f"return np.where({_PROBABILITIES} < p, np.float32(-np.inf), logits)",
    ),
    Mistake(
        "probabilities returned",
        "Probabilities are returned, with 0 for what is removed. Return the logits, with minus "
        "infinity.",
        _TOP_P,
        f"probabilities = {_PROBABILITIES}\n"
        "    return np.where(logits < ordered[last], 0, probabilities).astype(np.float32)",
    ),
    Mistake(
        "places of the sorted tokens",
        "What is kept is marked in the order of the sorted tokens and applied in order of the "
        "ids. Compare the logits with the last one kept instead.",
        _TOP_P,
        "return np.where(np.arange(logits.size) > last, np.float32(-np.inf), logits)",
    ),
    Mistake(
        "least likely first",
        "The sum begins with the least likely token, so nearly all are kept. Sort downwards.",
        _SORTED,
        "ordered = np.sort(logits)",
    ),
    Mistake(
        "not sorted",
        "The sum runs in order of the ids. The nucleus is made of the most likely tokens: sort "
        "before the cumulative sum.",
        _SORTED,
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
        "last of the race",
        "The token with the largest noise / probability is returned. The smallest wins: it is the "
        "largest probability / noise.",
        _WINNER,
        "return int(np.argmin(weights / noise))",
    ),
    Mistake(
        "noise multiplied",
        "The probability is multiplied by the noise. A time is the noise divided by the "
        "probability, so that likely tokens are fast.",
        _WINNER,
        "return int(np.argmax(weights * noise))",
    ),
    Mistake(
        "smallest product",
        "The probability is multiplied by the noise, and the smallest product wins, so unlikely "
        "tokens are drawn often. Divide the noise by the probability.",
        _WINNER,
        "return int(np.argmin(weights * noise))",
    ),
    Mistake(
        "logits taken for probabilities",
        "The logits are divided by the noise. Probabilities are exp(logit), divided by their sum.",
        _WINNER,
        "return int(np.argmax(logits / noise))",
    ),
    Mistake(
        "noise added to the logits",
        "The noise is added to the logits. Divide the noise by the probability. (In logarithms it "
        "is logit - log(noise).)",
        _WINNER,
        "return int(np.argmax(logits + noise))",
    ),
    Mistake(
        "noise subtracted from the logits",
        "The noise is subtracted from the logits. Divide the noise by the probability. (In "
        "logarithms it is logit - log(noise).)",
        _WINNER,
        "return int(np.argmax(logits - noise))",
    ),
    Mistake(
        "noise taken for uniform numbers",
        "The logarithm of the noise is divided by the probability. The numbers are exponential "
        "already; the logarithm makes exponential numbers of uniform ones.",
        _WINNER,
        "return int(np.argmax(weights / -np.log(noise)))",
    ),
    Mistake(
        "greedy instead of a draw",
        "The most likely token is returned, whatever the noise is.",
        _WINNER,
        "return int(weights.argmax())",
    ),
    Mistake(
        "probabilities ignored",
        "The token with the smallest noise is returned, so all tokens are equally likely. Divide "
        "the noise by the probability.",
        _WINNER,
        "return int(np.argmin(noise))",
    ),
    Mistake(
        "last of equal times",
        "Of equal times the last is returned. np.argmax returns the first; np.argsort(...)[-1] "
        "does not.",
        _WINNER,
        "return int(np.argsort(weights / noise, kind='stable')[-1])",
    ),
    Mistake(
        "position returned",
        "The position among the tokens that are left is returned; it must be the token's id.",
        _WINNER,
        "kept = np.flatnonzero(weights)\n    return int(np.argmax(weights[kept] / noise[kept]))",
    ),
    Mistake(
        "noise of another token",
        "The noise of the first tokens is used for the tokens that are left. Each token has its "
        "own noise: noise[token_ids].",
        _WINNER,
        "kept = np.flatnonzero(weights)\n"
        "    return int(kept[np.argmax(weights[kept] / noise[: kept.size])])",
    ),
    Mistake(
        "time instead of the id",
        "The time of the winner is returned. Return its place, the token's id: np.argmin of the "
        "times.",
        _WINNER,
        "return float(1 / (weights / noise).max())",
    ),
    Mistake(
        "maximum not subtracted",
        "The largest logit is not subtracted before np.exp, which overflows: several weights are "
        "inf.",
        _WEIGHTS,
        "weights = np.exp(logits.astype(np.float64))",
    ),
    Mistake(
        "temperature 0 divides",
        "Temperature 0 divides by 0. It means the greedy token.",
        _GREEDY,
        "",
    ),
    Mistake(
        "temperature 0 draws",
        "At temperature 0 a token is drawn. Return the greedy one.",
        f"{_GREEDY}    {_SCALED}",
        "    scores = logits / np.float32(temperature or 1)",
    ),
    Mistake(
        "logits divided in place",
        "`logits /= temperature` changes the array of the caller. Compute a new array.",
        _SCALED,
        "logits /= np.float32(temperature)\n    scores = logits",
    ),
    Mistake(
        "temperature ignored",
        "The temperature is not applied.",
        _SCALED,
        "scores = logits",
    ),
    Mistake(
        "temperature multiplied",
        "The logits are multiplied by the temperature; divide by it. A high temperature makes the "
        "probabilities more equal.",
        _SCALED,
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
        "    return draw(kept / np.float32(temperature), noise)",
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
    Mistake(
        "logits of top-p changed in place",
        "filter_top_p changes the logits that it is given. Compute a new array.",
        _TOP_P,
        "logits[logits < ordered[last]] = -np.inf\n    return logits",
    ),
)
