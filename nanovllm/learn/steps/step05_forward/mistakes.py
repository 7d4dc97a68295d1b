"""What goes wrong in step 5."""

from nanovllm.learn.checking import Mistake

_ATTENTION = "hidden = hidden + self_attention(normed, layer.qkv, layer.out, heads)"
_SECOND = (
    "normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)\n    return"
)
_FEED_FORWARD = "return hidden + feed_forward(normed, layer.up, layer.down)"
_FIRST_NORM = "layer_norm(hidden, layer.attention_norm.gain, layer.attention_norm.bias, epsilon)"
_SECOND_NORM = "layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)"
_GELU = "return (np.tanh(inner) + 1.0) * rows * 0.5"
_INNER = "math.sqrt(2.0 / math.pi) * (rows + 0.044715 * rows * rows * rows)"
_FINAL = "layer_norm(hidden, norm.gain, norm.bias, epsilon)"
_LOOP = "    for layer in weights.layers:\n"

_POWER = "(rows + 0.044715 * rows * rows * rows)"
_POSITIONS = "np.arange(len(token_ids))"
_RESULT = f"return logits({_FINAL}, weights.head)"
_BLOCK = "        hidden = block(hidden, layer, heads, epsilon)\n"

MISTAKES = (
    Mistake("no bias in linear", "The bias is not added.", " + layer.bias", ""),
    Mistake(
        "weight transposed",
        "The shapes do not fit. GPT-2 stores the weight as [d_in, d_out] (PyTorch's nn.Linear "
        "transposed): rows @ weight, a matrix product, and then the bias [d_out] is added.",
        "rows @ layer.weight + layer.bias",
        "rows @ layer.weight.T + layer.bias",
    ),
    Mistake(
        "gelu without the cube",
        "The term 0.044715 x^3 is missing or has another power.",
        "0.044715 * rows * rows * rows",
        "0.044715 * rows * rows",
    ),
    Mistake(
        "no cube at all",
        "The term 0.044715 x^3 is missing, or 0.044715 is cubed too (only x is).",
        _POWER,
        "rows",
    ),
    Mistake(
        "cube outside the parentheses",
        "sqrt(2/pi) is multiplied by x alone. It is multiplied by the sum x + 0.044715 x^3.",
        _INNER,
        "math.sqrt(2.0 / math.pi) * rows + 0.044715 * rows * rows * rows",
    ),
    Mistake(
        "no factor",
        "The sum x + 0.044715 x^3 is not multiplied by sqrt(2/pi).",
        _INNER,
        _POWER,
    ),
    Mistake(
        "root of the product",
        "The factor is sqrt(2 / pi), not sqrt(2 * pi).",
        "2.0 / math.pi",
        "2.0 * math.pi",
    ),
    Mistake(
        "x added to the tanh",
        "x is added to the tanh. It is multiplied: x times (1 + tanh).",
        _GELU,
        "return (np.tanh(inner) + rows) * 0.5",
    ),
    Mistake(
        "math for arrays",
        "math.tanh takes one number. np.tanh takes an array.",
        "np.tanh(inner)",
        "math.tanh(inner)",
    ),
    Mistake(
        "root of the two alone",
        "The factor is sqrt(2 / pi), the root of the quotient, not sqrt(2) / pi.",
        "math.sqrt(2.0 / math.pi)",
        "math.sqrt(2.0) / math.pi",
    ),
    Mistake(
        "no root",
        "The factor is sqrt(2 / pi); the root is missing.",
        "math.sqrt(2.0 / math.pi)",
        "(2.0 / math.pi)",
    ),
    Mistake("no half", "The factor 0.5 is missing.", "* rows * 0.5", "* rows"),
    Mistake(
        "one not added",
        "1 must be added to the tanh, so that large x is kept whole and large -x becomes 0.",
        "(np.tanh(inner) + 1.0)",
        "np.tanh(inner)",
    ),
    Mistake(
        "tanh alone",
        "The result is not multiplied by x: 0.5 (1 + tanh) only says which share of x is kept.",
        "(np.tanh(inner) + 1.0) * rows * 0.5",
        "(np.tanh(inner) + 1.0) * 0.5",
    ),
    Mistake(
        "exact gelu",
        "This is the exact gelu, x Phi(x), by the error function. GPT-2 was trained with the tanh "
        "approximation of the docstring, which differs by up to 0.0005.",
        _GELU,
        "erf = np.vectorize(math.erf)(rows / math.sqrt(2)).astype(np.float32)\n"
        "    return (erf + 1.0) * rows * 0.5",
    ),
    Mistake("relu", "This is relu, max(x, 0).", _GELU, "return np.maximum(rows, 0)"),
    Mistake(
        "sigmoid gelu",
        "This is x sigmoid(1.702 x), another approximation of gelu.",
        _GELU,
        "return rows / (1 + np.exp(-1.702 * rows))",
    ),
    Mistake(
        "no activation",
        "There is no gelu between the two linear layers. Without it they are one linear layer.",
        "linear(gelu(linear(hidden, up)), down)",
        "linear(linear(hidden, up), down)",
    ),
    Mistake(
        "gelu at the end",
        "The gelu belongs between the two linear layers, not behind them.",
        "linear(gelu(linear(hidden, up)), down)",
        "gelu(linear(linear(hidden, up), down))",
    ),
    Mistake(
        "gelu before",
        "gelu reads the hidden states. It belongs between the two linear layers.",
        "linear(gelu(linear(hidden, up)), down)",
        "linear(linear(gelu(hidden), up), down)",
    ),
    Mistake(
        "gelu twice",
        "gelu is applied behind `down` too. It belongs between the two linear layers only.",
        "linear(gelu(linear(hidden, up)), down)",
        "gelu(linear(gelu(linear(hidden, up)), down))",
    ),
    Mistake(
        "up and down exchanged",
        "The shapes do not fit: `up` comes first, from d_model to d_ff, then `down`, back to "
        "d_model.",
        "linear(gelu(linear(hidden, up)), down)",
        "linear(gelu(linear(hidden, down)), up)",
    ),
    Mistake(
        "residual in the feed-forward network",
        "feed_forward adds its input. `block` does that, with the rows before the normalization.",
        "return linear(gelu(linear(hidden, up)), down)",
        "return hidden + linear(gelu(linear(hidden, up)), down)",
    ),
    Mistake(
        "no biases",
        "The biases of `up` and `down` are missing: use `linear`.",
        "linear(gelu(linear(hidden, up)), down)",
        "gelu(hidden @ up.weight) @ down.weight",
    ),
    Mistake(
        "up and down exchanged in the block",
        "The shapes do not fit. feed_forward takes `up` before `down`; self_attention takes `qkv` "
        "before `out`.",
        "layer.up, layer.down",
        "layer.down, layer.up",
    ),
    Mistake(
        "second residual of the input",
        "The feed-forward network's result is added to the block's input, so attention's result "
        "is lost. Add it to the sum with attention.",
        f"{_ATTENTION}\n    {_SECOND} hidden +",
        f"before = hidden\n    {_ATTENTION}\n    {_SECOND} before +",
    ),
    Mistake(
        "second residual of the normalized rows",
        "The feed-forward network's result is added to the normalized rows. Add it to the rows "
        "before the normalization.",
        _FEED_FORWARD,
        _FEED_FORWARD.replace("hidden + ", "normed + "),
    ),
    Mistake(
        "norms exchanged",
        "attention_norm and ffn_norm are exchanged.",
        f"    normed = {_FIRST_NORM}\n    {_ATTENTION}\n    normed = {_SECOND_NORM}",
        f"    normed = {_SECOND_NORM}\n    {_ATTENTION}\n    normed = {_FIRST_NORM}",
    ),
    Mistake(
        "feed-forward network first",
        "The feed-forward network comes before attention. Attention is first.",
        f"    normed = {_FIRST_NORM}\n    {_ATTENTION}\n    {_SECOND} hidden + "
        "feed_forward(normed, layer.up, layer.down)",
        f"    hidden = hidden + feed_forward({_SECOND_NORM}, layer.up, layer.down)\n"
        f"    normed = {_FIRST_NORM}\n    return {_ATTENTION.replace('hidden = ', '')}",
    ),
    Mistake(
        "no normalizations",
        "Attention and feed-forward network read the hidden states themselves. They read them "
        "through attention_norm and ffn_norm.",
        f"    normed = {_FIRST_NORM}\n    {_ATTENTION}\n    normed = {_SECOND_NORM}",
        f"    normed = hidden\n    {_ATTENTION}\n    normed = hidden",
    ),
    Mistake(
        "no feed-forward network",
        "The block ends after attention. The feed-forward network follows.",
        _FEED_FORWARD,
        "return hidden",
    ),
    Mistake(
        "no residual around attention",
        "The attention's result replaces the hidden states. It is added to them.",
        _ATTENTION,
        _ATTENTION.replace("hidden + ", ""),
    ),
    Mistake(
        "no residual around the feed-forward network",
        "The feed-forward network's result replaces the hidden states. It is added to them.",
        _FEED_FORWARD,
        _FEED_FORWARD.replace("hidden + ", ""),
    ),
    Mistake(
        "no residuals",
        "Attention and feed-forward network replace the hidden states. Both are added to them.",
        f"{_ATTENTION}\n    {_SECOND} hidden + feed_forward",
        f"{_ATTENTION.replace('hidden + ', '')}\n    {_SECOND} feed_forward",
    ),
    Mistake(
        "residual of the normalized rows",
        "The results are added to the normalized rows. Add them to the rows before the "
        "normalization, which must pass through a block unchanged.",
        f"{_ATTENTION}\n    {_SECOND} hidden + feed_forward",
        f"{_ATTENTION.replace('hidden + ', 'normed + ')}\n    {_SECOND} normed + feed_forward",
    ),
    Mistake(
        "no first normalization",
        "Attention reads the hidden states themselves. It reads them through attention_norm.",
        _FIRST_NORM,
        "hidden",
    ),
    Mistake(
        "no second normalization",
        "The feed-forward network reads the hidden states themselves. It reads them through "
        "ffn_norm.",
        _SECOND_NORM,
        "hidden",
    ),
    Mistake(
        "one normalization for both",
        "The feed-forward network reads what attention reads, so it does not see what attention "
        "has added. Normalize again after the first addition.",
        _SECOND_NORM,
        "normed",
    ),
    Mistake(
        "attention_norm twice",
        "attention_norm is used in both places. The feed-forward network has ffn_norm.",
        _SECOND_NORM,
        _FIRST_NORM,
    ),
    Mistake(
        "normalization behind",
        "The sum is normalized behind each addition, as in the first transformer of 2017. GPT-2 "
        "normalizes what attention and the feed-forward network read, and adds to the rows as "
        "they are.",
        f"    normed = {_FIRST_NORM}\n    {_ATTENTION}\n    {_SECOND} hidden + "
        "feed_forward(normed, layer.up, layer.down)",
        f"    {_ATTENTION.replace('normed', 'hidden')}\n    hidden = {_FIRST_NORM}\n    hidden = "
        f"hidden + feed_forward(hidden, layer.up, layer.down)\n    return {_SECOND_NORM}",
    ),
    Mistake(
        "parallel block",
        "Attention and feed-forward network both read the block's input. In GPT-2 the feed-forward "
        "network reads the hidden states to which attention has been added.",
        f"{_ATTENTION}\n    {_SECOND}",
        f"before = hidden\n    {_ATTENTION}\n    "
        f"{_SECOND.replace('layer_norm(hidden', 'layer_norm(before')}",
    ),
    Mistake(
        "block in place",
        "`hidden += ...` changes the array of the caller. Write hidden = hidden + ...",
        _ATTENTION,
        _ATTENTION.replace("hidden = hidden +", "hidden +="),
    ),
    Mistake(
        "gelu in place",
        "gelu changes the array that it is given. Compute a new one.",
        _GELU,
        "rows *= (np.tanh(inner) + 1.0) * 0.5\n    return rows",
    ),
    Mistake(
        "no positions",
        "The position embedding is not added: the model cannot tell the order of the tokens.",
        "embed(token_ids, positions, weights.token_embedding, weights.position_embedding)",
        "weights.token_embedding[token_ids]",
    ),
    Mistake(
        "positions from one",
        "The first token has the position 0, not 1.",
        "np.arange(len(token_ids))",
        "1 + np.arange(len(token_ids))",
    ),
    Mistake(
        "positions of the token ids",
        "The token ids are given as the positions. The positions are 0, 1, 2 and so on: np.arange.",
        _POSITIONS,
        "token_ids",
    ),
    Mistake(
        "whole position table",
        "The whole position table is added, a row for each position there can be. Take the rows "
        "0 to tokens - 1.",
        "embed(token_ids, positions, weights.token_embedding, weights.position_embedding)",
        "weights.token_embedding[token_ids] + weights.position_embedding",
    ),
    Mistake(
        "result of the block dropped",
        "The blocks' results are not used: `block` returns a new array. Write hidden = block(...).",
        _BLOCK,
        _BLOCK.replace("hidden = ", ""),
    ),
    Mistake(
        "every block reads the embeddings",
        "Every block reads the embeddings, so only the last one counts. A block reads the result "
        "of the block before it.",
        _LOOP + _BLOCK,
        "    hidden = block(hidden, weights.layers[-1], heads, epsilon)\n",
    ),
    Mistake(
        "block added",
        "The block's result is added to the hidden states. `block` has added them itself.",
        _BLOCK,
        _BLOCK.replace("= block", "= hidden + block"),
    ),
    Mistake(
        "final normalization after each block",
        "final_norm is applied after each block. It comes once, behind the last one.",
        f"{_BLOCK}    norm = weights.final_norm\n    {_RESULT}",
        f"{_BLOCK}        norm = weights.final_norm\n        hidden = {_FINAL}\n"
        "    return logits(hidden, weights.head)",
    ),
    Mistake(
        "hidden states returned",
        "The normalized hidden states are returned. Multiply them by the head: `logits`.",
        _RESULT,
        f"return {_FINAL}",
    ),
    Mistake(
        "softmax returned",
        "The rows are probabilities. Return the logits; step 6 divides them by a temperature.",
        _RESULT,
        f"rows = np.exp(logits({_FINAL}, weights.head))\n"
        "    return rows / rows.sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "first layer for all",
        "Every block has the weights of the first layer.",
        _LOOP,
        "    for layer in [weights.layers[0]] * len(weights.layers):\n",
    ),
    Mistake(
        "one layer left out",
        "The last layer is left out.",
        _LOOP,
        "    for layer in weights.layers[:-1]:\n",
    ),
    Mistake(
        "layers reversed",
        "The layers are applied from the last to the first.",
        _LOOP,
        "    for layer in weights.layers[::-1]:\n",
    ),
    Mistake(
        "no final normalization",
        "The hidden states go to the head without final_norm.",
        _FINAL,
        "hidden",
    ),
    Mistake(
        "token embedding as head",
        "The token embedding is used as the head. Many GPT-2 have the same array in both places, "
        "this one has not: use weights.head.",
        "weights.head)",
        "weights.token_embedding)",
    ),
    Mistake(
        "last row only",
        "Only the logits of the last token are returned. Return a row for every token.",
        f"return logits({_FINAL}, weights.head)",
        f"return logits({_FINAL}, weights.head)[-1:]",
    ),
    Mistake(
        "probabilities",
        "The rows are log-probabilities. Return the logits; step 6 divides them by a temperature.",
        f"return logits({_FINAL}, weights.head)",
        f"rows = logits({_FINAL}, weights.head)\n"
        "    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))",
    ),
)
