"""What goes wrong in step 2."""

from nanovllm.learn.checking import Mistake

_EMBED = "return token_embedding[token_ids] + position_embedding[positions]"
_SUM = "weights = np.exp(logits - logits.max(axis=1, keepdims=True))"
_SHARE = "return weights / weights.sum(axis=1, keepdims=True)"
_SHIFTED = "shifted = logits - logits.max(axis=1, keepdims=True)"
_PICKED = "log_softmax(logits)[np.arange(len(targets)), targets]"
_MEAN = "return float(-logprobs.mean(dtype=np.float64))"

_DOT = "return hidden @ head.T"
_LOG_SHARE = "return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))"

MISTAKES = (
    Mistake(
        "rows in a list",
        "The rows are returned as a list. Return one array, such as np.stack(rows).",
        _EMBED,
        f"{_EMBED.replace('return ', 'return list(')})",
    ),
    Mistake(
        "embeddings side by side",
        "The two embeddings are joined. They are added, so that a row keeps d_model columns.",
        _EMBED,
        "return np.concatenate([token_embedding[token_ids], position_embedding[positions]], 1)",
    ),
    Mistake(
        "first rows of the table",
        "The first rows of the token embedding are taken. Row i of the result is the row of the "
        "table that token_ids[i] names: token_embedding[token_ids].",
        "token_embedding[token_ids]",
        "token_embedding[: len(token_ids)]",
    ),
    Mistake(
        "numbers of the positions",
        "The positions themselves are added. Each names a row of the position table: "
        "position_embedding[positions].",
        "position_embedding[positions]",
        "positions[:, None]",
    ),
    Mistake(
        "logits transposed",
        "The result is [vocab, rows]. A row of the result belongs to a row of hidden states: "
        "hidden @ head.T.",
        _DOT,
        "return head @ hidden.T",
    ),
    Mistake(
        "softmax of the logits",
        "Probabilities are returned. The logits are the dot products themselves.",
        _DOT,
        "return softmax(hidden @ head.T)",
    ),
    Mistake(
        "logits scaled",
        "The logits are divided by sqrt(d_model). Only attention (step 4) scales its scores.",
        _DOT,
        "return hidden @ head.T / np.float32(hidden.shape[1] ** 0.5)",
    ),
    Mistake(
        "no keepdims",
        "The maximum or the sum of the rows has the shape [rows], which NumPy takes for a number "
        "of each column. keepdims=True keeps [rows, 1], a number of each row.",
        _SHARE,
        "return weights / weights.sum(axis=1)",
    ),
    Mistake(
        "no exponential",
        "The logits are divided by their sum. Divide their exponentials by the sum of those.",
        f"    {_SUM}\n    {_SHARE}",
        "    return logits / logits.sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "divided by the mean",
        "The exponentials are divided by their mean, so a row sums to vocab. Divide by the sum.",
        "weights.sum(axis=1, keepdims=True)",
        "weights.mean(axis=1, keepdims=True)",
    ),
    Mistake(
        "divided by the maximum",
        "The logits are divided by the largest. Subtract it: exp(x - max) is exp(x) / exp(max), so "
        "the shares stay the same.",
        _SUM,
        "weights = np.exp(logits / logits.max(axis=1, keepdims=True))",
    ),
    Mistake(
        "sum without the logarithm",
        "The sum of the exponentials is subtracted; subtract its logarithm.",
        _LOG_SHARE,
        "return shifted - np.exp(shifted).sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "maximum subtracted from one of two",
        "The maximum is subtracted inside the sum only. log p = (x - max) - log(sum of "
        "exp(x - max)): subtract it from both.",
        "return shifted - np.log",
        "return logits - np.log",
    ),
    Mistake(
        "log of one sum of all rows",
        "The sum runs over all rows. Each row is a distribution of its own: axis=1.",
        _LOG_SHARE,
        "return shifted - np.log(np.exp(shifted).sum())",
    ),
    Mistake(
        "no keepdims in log-softmax",
        "The sum of the rows has the shape [rows]. keepdims=True keeps [rows, 1], a number of each "
        "row.",
        _LOG_SHARE,
        "return shifted - np.log(np.exp(shifted).sum(axis=1))",
    ),
    Mistake(
        "sum of the logarithms",
        "The logarithms are summed. Take the logarithm of the sum: np.log(np.exp(x).sum(...)).",
        _LOG_SHARE,
        "return shifted - np.log(np.exp(shifted)).sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "small number added",
        "A small number is added before the logarithm, so all improbable tokens look alike. Use "
        "log p = x - max - log(sum of exp(x - max)).",
        f"{_SHIFTED}\n    {_LOG_SHARE}",
        "return np.log(softmax(logits) + np.float32(1e-10))",
    ),
    Mistake(
        "probability of the target",
        "The mean of p(target) is taken. The loss is the mean of its logarithm, with a minus sign.",
        _MEAN,
        "return float(-np.exp(logprobs).mean(dtype=np.float64))",
    ),
    Mistake(
        "logits of the targets",
        "The logits of the targets are averaged. Use log_softmax of the logits.",
        _PICKED,
        "logits[np.arange(len(targets)), targets]",
    ),
    Mistake(
        "mean over the vocabulary",
        "The mean also counts the zeros of all other tokens. Sum over the vocabulary, then take "
        "the mean of the rows.",
        _MEAN,
        "return float(-logprobs.mean(dtype=np.float64) / logits.shape[1])",
    ),
    Mistake(
        "loss of each row",
        "A loss for each row is returned. Return their mean.",
        _MEAN,
        "return -logprobs",
    ),
    Mistake(
        "loss in bits",
        "The loss is in bits. In nats it is not divided by ln 2.",
        _MEAN,
        "return float(-logprobs.mean(dtype=np.float64) / np.log(2))",
    ),
    Mistake(
        "targets name rows",
        "`targets` picks rows. Each target names a column of its own row: "
        "[np.arange(rows), targets].",
        _PICKED,
        "log_softmax(logits)[targets]",
    ),
    Mistake(
        "no positions",
        "The embedding of the position is not added. Without it a token looks the same wherever "
        "it stands.",
        _EMBED,
        "return token_embedding[token_ids]",
    ),
    Mistake(
        "positions restart",
        "Row 0 gets position 0, whatever `positions` says.",
        "position_embedding[positions]",
        "position_embedding[: len(positions)]",
    ),
    Mistake(
        "position of the token id",
        "The position table is looked up with the token ids; it needs `positions`.",
        "position_embedding[positions]",
        "position_embedding[token_ids]",
    ),
    Mistake(
        "embeddings multiplied",
        "Token and position are multiplied; add them.",
        "token_embedding[token_ids] + position_embedding[positions]",
        "token_embedding[token_ids] * position_embedding[positions]",
    ),
    Mistake(
        "head not transposed",
        "The head is [vocab, d_model], a row for each token. A row of hidden states times the "
        "transposed head gives a dot product with each of them.",
        _DOT,
        "return hidden @ head",
    ),
    Mistake(
        "not divided by the sum",
        "The exponentials are not divided by their sum, so they are no probabilities.",
        _SHARE,
        "return weights",
    ),
    Mistake(
        "one sum of all rows",
        "The sum runs over all rows. Each row is a distribution of its own: axis=1.",
        _SHARE,
        "return weights / weights.sum()",
    ),
    Mistake(
        "softmax of the whole array",
        "All probabilities of the array together sum to 1. Each row must: axis=1, keepdims=True "
        "for the maximum and for the sum.",
        f"    {_SUM}\n    {_SHARE}",
        "    weights = np.exp(logits - logits.max())\n    return weights / weights.sum()",
    ),
    Mistake(
        "softmax over the rows",
        "The softmax runs over axis 0, the rows. The probabilities of all tokens at one row sum "
        "to 1: axis 1.",
        f"    {_SUM}\n    {_SHARE}",
        f"    {_SUM}\n    {_SHARE}".replace("axis=1", "axis=0"),
    ),
    Mistake(
        "maximum not subtracted",
        "The largest logit is not subtracted before np.exp. Large logits overflow to inf, small "
        "ones all become 0, and inf / inf and 0 / 0 are NaN.",
        _SUM,
        "weights = np.exp(logits)",
    ),
    Mistake(
        "one maximum for all rows",
        "The largest logit of all rows is subtracted. Where a row lies far below it, all its "
        "exponentials are 0, and 0 / 0 is NaN. Take the maximum of each row.",
        _SUM,
        "weights = np.exp(logits - logits.max())",
    ),
    Mistake(
        "logarithm of the softmax",
        "np.log(softmax(logits)) is -inf where the probability rounds to 0. Use log p = x - max - "
        "log(sum of exp(x - max)).",
        f"{_SHIFTED}\n    {_LOG_SHARE}",
        "return np.log(softmax(logits))",
    ),
    Mistake(
        "maximum not subtracted in log-softmax",
        "The softmax subtracts the largest logit, log_softmax does not: the sum of the "
        "exponentials overflows or is 0.",
        _SHIFTED,
        "shifted = logits",
    ),
    Mistake(
        "logarithm to base 2",
        "np.log2 is used. The natural logarithm, np.log, is the inverse of np.exp; a loss in bits "
        "is the loss in nats divided by ln 2.",
        "np.log(np.exp(shifted)",
        "np.log2(np.exp(shifted)",
    ),
    Mistake(
        "no sign",
        "The mean of log p is negative. The loss is its opposite, 0 for a model that is always "
        "right and sure.",
        "float(-logprobs",
        "float(logprobs",
    ),
    Mistake(
        "sum instead of mean",
        "The losses are summed. The mean does not depend on how many tokens there are, so texts "
        "and batches of any length can be compared.",
        _MEAN,
        "return float(-logprobs.sum(dtype=np.float64))",
    ),
    Mistake(
        "logarithm of the mean",
        "The mean is taken of the probabilities, and then the logarithm. Each token's own "
        "logarithm counts: -log 0.01 weighs much more than its share of the mean.",
        _MEAN,
        "return float(-np.log(np.exp(logprobs).mean(dtype=np.float64)))",
    ),
    Mistake(
        "every target at every row",
        "`[:, targets]` picks all targets at each row: [rows, rows] numbers. Pick one number a row "
        "with [np.arange(rows), targets].",
        _PICKED,
        "log_softmax(logits)[:, targets]",
    ),
    Mistake(
        "loss of the most likely token",
        "The loss is that of the largest logit. It must be that of the target, whatever the model "
        "prefers.",
        _PICKED,
        "log_softmax(logits)[np.arange(len(targets)), logits.argmax(axis=1)]",
    ),
    Mistake(
        "targets shifted again",
        "Row i is compared with target i + 1. `targets` already has the token that follows row i.",
        _PICKED,
        "log_softmax(logits)[np.arange(len(targets) - 1), targets[1:]]",
    ),
    Mistake(
        "logits changed in place",
        "The logits themselves are changed (by -= or by out=logits). Compute a new array.",
        _SHIFTED,
        "logits -= logits.max(axis=1, keepdims=True)\n    shifted = logits",
    ),
)
