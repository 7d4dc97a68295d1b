/** The card that shows how one head computes the output of one token. */

import { onThemeChange } from "../charts/colors.js";
import { busy, button, card, errorMessage } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { sentence, steps } from "./head_steps.js";
import { rowTable } from "./head_table.js";

/**
 * @import { Token } from "../elements/format.js"
 * @import { Head } from "./head_steps.js"
 * @typedef {{layer: number, head: number, query: number}} Row
 */

const SETTLE_MS = 150; // without another choice before a request: arrow keys repeat

/**
 * Return the card of a row. Another row aborts the request of the last one.
 * @param {{tokens: Token[],
 *   load: (row: Row, signal: AbortSignal) => Promise<Head>}} options
 */
export function headRow({ tokens, load }) {
  const title = h("p", { class: "secondary v-lead" });
  const body = h("div", { class: "v-row-body" });
  const element = card("How this row is computed", { class: "v-row-card" }, [title, body]);
  let current = "";
  let markedKey = 0;
  /** @type {ReturnType<typeof rowTable> | null} */
  let table = null;
  /** @type {AbortController | null} */
  let running = null;
  let timer = 0;

  function stop() {
    clearTimeout(timer);
    running?.abort();
    running = null;
  }

  /** @param {Row} row */
  async function start(row) {
    const controller = new AbortController();
    running = controller;
    try {
      const answer = await load(row, controller.signal);
      if (controller.signal.aborted) return;
      table = rowTable(tokens, answer);
      replace(title, sentence(tokens, answer));
      replace(body, steps(tokens.length, answer), table.element);
      table.mark(markedKey);
    } catch (/** @type {any} */ error) {
      if (controller.signal.aborted) return;
      table = null;
      const again = button("Try again", { small: true }, () => request(row));
      replace(body, h("div", { class: "stack tight" }, errorMessage(error.message), again));
    }
    element.removeAttribute("aria-busy");
  }

  /** @param {Row} row */
  function request(row) {
    stop();
    if (!table) replace(body, busy("Computing the row"));
    element.setAttribute("aria-busy", "true");
    timer = setTimeout(() => start(row), SETTLE_MS);
  }

  onThemeChange(element, () => table?.paint());
  return {
    element,
    stop,
    /**
     * Show a row, and mark a key of it.
     * @param {{layer: number, head: number, query: number}} row
     * @param {number} key
     */
    show(row, key) {
      const name = `${row.layer} ${row.head} ${row.query}`;
      const isNew = name !== current;
      current = name;
      markedKey = key;
      if (isNew) request(row);
      else table?.mark(key);
    },
  };
}
