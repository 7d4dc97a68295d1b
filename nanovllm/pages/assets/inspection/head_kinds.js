/**
 * Kinds of attention head, by what their weights are on.
 *
 * @typedef {{layer: number, head: number, distance: number, entropy: number,
 *   [kind: string]: any}} Head an entry of the overview: a mean weight of each kind, or null
 */

import { button } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { formatNumber, formatPercent, formatThings } from "../elements/format.js";

const CHIP_SHARE = 0.4; // minimum mean weight of a kind for its label
const CLEAR_SHARE = 0.3; // minimum mean weight of a head that does it clearly
const MIN_TOKENS = 4; // minimum prompt length for the statistics of the other kinds
const MIN_REPEATS = 5; // minimum number of repeated tokens for the statistic of induction

const CLEAR_TEXT = formatPercent(CLEAR_SHARE);
const SHORT_PROMPT = `The prompt is too short: this needs at least ${MIN_TOKENS} tokens.`;

/** The kinds of head that the overview finds; the statistics are mean weights over the prompt. */
export const HEAD_KINDS = [
  {
    key: "previous_token",
    name: "Previous token",
    chip: "previous",
    what: "the token just before",
  },
  { key: "first_token", name: "First token", chip: "first", what: "the first token of the prompt" },
  { key: "self", name: "Same token", chip: "same", what: "the query token itself" },
  {
    key: "induction",
    name: "Induction",
    chip: "induction",
    what: "the token that followed the last time this one appeared",
  },
];

/**
 * Return the heads, without their induction where the prompt repeats too few tokens for a mean.
 * @param {Head[]} heads
 * @param {number} numRepeats
 */
export function withoutChance(heads, numRepeats) {
  if (numRepeats >= MIN_REPEATS) return heads;
  return heads.map((head) => ({ ...head, induction: null }));
}

/**
 * Return the number of tokens that occurred before in a prompt, but not directly before.
 * @param {{id: number}[]} tokens
 */
export function countRepeats(tokens) {
  const seen = new Set();
  return tokens.filter(({ id }, index) => {
    if (index >= 2) seen.add(tokens[index - 2].id);
    return seen.has(id);
  }).length;
}

/**
 * Return the head with the largest statistic of each kind, where the prompt has one.
 * @param {Head[]} heads
 */
export function findBest(heads) {
  /** @type {Record<string, Head>} */
  const best = {};
  for (const { key } of HEAD_KINDS) {
    const known = heads.filter((head) => head[key] !== null && head[key] !== undefined);
    if (known.length) best[key] = known.reduce((a, b) => (b[key] > a[key] ? b : a));
  }
  return best;
}

/**
 * Return the card of a kind: the strongest head, or what the prompt lacks to show one.
 * @param {typeof HEAD_KINDS[number]} kind
 * @param {Head | undefined} head undefined if the prompt shows none
 * @param {{numRepeats: number, onSelect: (head: Head) => void, onExample?: () => void}} options
 *   `onExample` shows a prompt that repeats a sequence
 */
export function finderCard({ key, name, what }, head, { numRepeats, onSelect, onExample }) {
  const title = h("span", { class: "v-finder-name", text: name });
  const note = (/** @type {string} */ text) => h("span", { class: "secondary", text });
  if (!head) {
    const isInduction = key === "induction";
    const text = isInduction ? inductionNeed(numRepeats) : SHORT_PROMPT;
    const example =
      isInduction && onExample && button("Show an example", { small: true }, onExample);
    const element = h("div", { class: "card stack v-finder" }, title, note(text), example);
    return { element, mark: () => {} };
  }
  const share = `${formatPercent(head[key])} of its weight on ${what}`;
  const isClear = head[key] >= CLEAR_SHARE;
  const element = h(
    "button",
    { class: "card stack v-finder", onclick: () => onSelect(head) },
    title,
    h("span", {
      class: isClear ? "v-finder-head" : "v-finder-head secondary",
      text: `Layer ${head.layer}, head ${head.head}`,
    }),
    note(isClear ? share : `Only ${share}, less than ${CLEAR_TEXT}: no head does this clearly.`),
  );
  return {
    element,
    mark: (/** @type {Head} */ now) => element.setAttribute("aria-pressed", String(now === head)),
  };
}

/** @param {number} numRepeats */
function inductionNeed(numRepeats) {
  const has = numRepeats
    ? `repeats ${formatThings(numRepeats, "token")}, fewer than ${MIN_REPEATS}`
    : "repeats no token";
  return (
    "An induction head continues a sequence that came before. It needs a prompt that repeats a " +
    `sequence; this one ${has}.`
  );
}

/** Return what a head does, as a sentence. @param {Head} head */
export function describeHead(head) {
  const shares = HEAD_KINDS.filter(({ key }) => head[key] >= 0.1)
    .sort((a, b) => head[b.key] - head[a.key])
    .map(({ key, what }) => `${formatPercent(head[key])} on ${what}`);
  const where = shares.length ? `On average ${shares.join(", ")}.` : "Its weights are spread out.";
  return (
    `${where} Mean distance ${formatNumber(head.distance)} tokens, ` +
    `mean entropy ${formatNumber(head.entropy)} nats.`
  );
}

/** Return the kinds that a head's label names. @param {Head} head */
export function clearKinds(head) {
  return HEAD_KINDS.filter(({ key }) => head[key] >= CHIP_SHARE);
}
