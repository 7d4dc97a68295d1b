/** What the reports of one run and of several share: values, states, tables and samples. */

import { h } from "../elements/dom.js";
import { formatCompact, formatCount, shortNumber } from "../elements/format.js";

/**
 * @import { Run } from "./report_curves.js"
 * @typedef {{step: number, text: string, prompt: string}} Sample
 */

export const MISSING = "–";
export const MAX_ROWS = 100;
/** @type {Record<string, string>} */
const STATES = {
  running: "Running",
  finished: "Finished",
  stopped: "Stopped",
  failed: "Failed",
  unknown: "State unknown",
};
/**
 * Return a value as `format` writes it, or a dash where it is not known.
 * @param {number | null | undefined} value
 * @param {(value: number) => string} format
 */
export function known(value, format) {
  return value === null || value === undefined ? MISSING : format(value);
}

/** Return a loss with four decimals, or without decimals if it is large. @param {number} value */
export function formatLoss(value) {
  return Math.abs(value) < 1000 ? value.toFixed(4) : shortNumber(value);
}

/** Return exp(loss). @param {number} loss in nats per token */
export function formatPerplexity(loss) {
  if (loss > Math.log(1e15)) return MISSING;
  const perplexity = Math.exp(loss);
  return perplexity < 1000 ? perplexity.toFixed(2) : formatCompact(perplexity);
}

/** @param {number} bits */
export function formatBits(bits) {
  return bits.toFixed(3);
}

/** @param {string} state */
export function stateBadge(state) {
  return h("span", { class: `badge state ${state}`, text: STATES[state] });
}

/**
 * Return why a run ended, whether it overfits, and what could not be read.
 * @param {Run} run
 * @param {string} state
 */
export function notices({ message, notices: others }, state) {
  const kind = state === "failed" ? "message error" : "message";
  return [
    message && h("p", { class: kind, text: message }),
    others.map((/** @type {string} */ text) => h("p", { class: "message", text })),
  ];
}

/** @param {string} title @param {Sample} sample */
export function sampleCard(title, { text, prompt }) {
  const rest = text.slice(prompt.length);
  const marked = prompt && h("mark", { text: prompt });
  return h("article", { class: "card sample" }, [
    h("h3", { text: title }),
    h("pre", { dir: "auto" }, marked, rest),
  ]);
}

/** Return what a marked prompt is, if a sample has one. @param {Sample[]} samples */
export function promptNote(samples) {
  if (!samples.some(({ prompt }) => prompt)) return null;
  const text = " beginning of a sample is its prompt, the first tokens of the validation text.";
  return [" The ", h("mark", { text: "marked" }), text];
}

/**
 * Return commands for the checkpoint, {what it does: command}.
 * @param {Record<string, string>} commands
 * @param {string} [title]
 */
export function commandSection(commands, title = "Use the model") {
  if (!Object.keys(commands).length) return null;
  const rows = Object.entries(commands).map(([label, command]) => [
    h("dt", { text: label }),
    h("dd", {}, h("code", { text: command })),
  ]);
  return h("section", {}, h("h2", { text: title }), h("dl", { class: "card commands" }, rows));
}

/**
 * Return a table that scrolls sideways where the page is narrow; a row begins with its name.
 * @param {string} name
 * @param {string[]} heads
 * @param {import("../elements/dom.js").Leaf[][]} rows
 * @param {string} [kind]
 */
export function table(name, heads, rows, kind = "numbers") {
  const head = h("tr", {}, [heads.map((text) => h("th", { scope: "col", text }))]);
  const body = rows.map(([first, ...rest]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, first),
      rest.map((cell) => h("td", {}, cell)),
    ),
  );
  return h("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": name }, [
    h("table", { class: kind }, h("thead", {}, head), h("tbody", {}, body)),
  ]);
}

/** @param {Run} run */
export function stepsOf({ step, total_steps: total }) {
  return formatCount(step) + (total === null ? "" : ` of ${formatCount(total)}`);
}
