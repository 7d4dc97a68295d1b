/** The steps of a row of attention in words: softmax(q K^T / sqrt(d)) V. */

import { h } from "../elements/dom.js";
import { formatNumber, formatThings, tokenLabel } from "../elements/format.js";

/** @import { Token } from "../elements/format.js" */

/**
 * An answer of POST /v1/inspect/attention_head.
 * @typedef {{layer: number, head: number, query: number, scale: number, q: number[], k: number[][],
 *   v: number[][], scores: number[], weights: number[], output: number[]}} Head
 */

/**
 * Return which row it is, in words and as the formula.
 * @param {Token[]} tokens
 * @param {Head} head
 */
export function sentence(tokens, { layer, head, query, scale, q }) {
  return [
    "The output of ",
    h("code", { text: nameOf(tokens, query) }),
    ` in layer ${layer}, head ${head}: `,
    h("code", { text: `softmax(q Kᵀ ${scaling(scale, q.length)}) V` }),
    `, with vectors of d = ${q.length} dimensions.`,
  ];
}

/** @param {Token[]} tokens @param {number} index */
export function nameOf(tokens, index) {
  return `${tokenLabel(tokens[index])} (${index})`;
}

/**
 * Return the factor of the scores as a part of a formula.
 * @param {number} scale
 * @param {number} size
 */
export function scaling(scale, size) {
  return isUsualScale(scale, size) ? `/ √${size}` : `× ${formatNumber(scale, 4)}`;
}

/** @param {number} scale @param {number} size */
function isUsualScale(scale, size) {
  return Math.abs(scale * Math.sqrt(size) - 1) < 1e-5;
}

/**
 * Return the steps of the computation, with what they mean.
 * @param {number} numTokens
 * @param {Head} head
 */
export function steps(numTokens, { scale, q, query }) {
  const size = q.length;
  const later = numTokens - 1 - query;
  const scaled = isUsualScale(scale, size)
    ? `Sums of ${size} products spread like √${size}; divided by it, the spread does not depend on ` +
      "the number of dimensions, and the softmax does not settle on one token."
    : "The factor is that of the model's configuration.";
  const mask = later
    ? `Causal mask: the ${formatThings(later, "later token")} of the prompt would get the score −∞, ` +
      "so the weight 0, and have no row here."
    : "Causal mask: later tokens would get the score −∞, so the weight 0; this token is the last.";
  const items = [
    [
      "Query, key, value",
      "q = x W_q   k = x W_k   v = x W_v",
      "Learned matrices turn the vector x of a token into what it looks for (query), what it can " +
        "be found by (key) and what it passes on (value).",
    ],
    [
      "Score",
      `score = q · k ${scaling(scale, size)}`,
      `The dot product is large where query and key point in the same direction. ${scaled}`,
    ],
    [
      "Weight",
      "weight = exp(score) / Σ exp(score)",
      "The softmax makes weights that are positive and sum to 1; only differences of scores count. " +
        mask,
    ],
    [
      "Output",
      "output = Σ weight · v",
      "The values add up, each by its weight. The outputs of all heads, side by side, then go " +
        "through the output projection.",
    ],
  ];
  return h("ol", { class: "v-steps" }, [
    items.map(([name, formula, text]) =>
      h("li", {}, h("strong", { text: name }), h("code", { text: formula }), h("span", { text })),
    ),
  ]);
}
