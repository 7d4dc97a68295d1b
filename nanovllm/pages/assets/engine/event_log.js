/** The log of admissions, cache hits, preemptions and ends of requests, newest first. */

import { h, replace } from "../elements/dom.js";
import { formatCount, formatThings } from "../elements/format.js";

/** @import { Names, StepRecord } from "./replay.js" */

/**
 * @typedef {{step: number, kind: string, id: string, text: string, count?: number,
 *   isLoaded?: boolean}} Line a gap has a number of steps, and whether the server has no record of them
 */

const MAX_LINES = 60;

/**
 * Return the log.
 * @param {{names: Names,
 *   onSelect: (id: string) => void, onWatch: (step: number) => void}} options
 */
export function eventLog({ names, onSelect, onWatch }) {
  const list = h("ol", { class: "v-log" });
  const label = "Events, newest first";
  const attributes = { class: "v-log-scroll", tabindex: 0, role: "region", "aria-label": label };
  const scroller = h("div", { ...attributes, hidden: true }, list);
  const empty = h("p", { class: "secondary", text: "Nothing has happened yet." });
  let drawn = "";
  /** @type {string | null} */
  let selected = null;
  /** @type {Line[]} */
  let lines = [];

  /**
   * @param {Set<string>} preempted ids of the requests that were preempted before the record
   * @param {StepRecord} record
   */
  function linesOf(record, preempted) {
    /** @param {string} kind @param {string} id @param {string} text */
    const line = (kind, id, text) => ({ step: record.step, kind, id, text });
    return [
      ...record.admitted.map((id) =>
        line("admitted", id, preempted.has(id) ? "admitted again" : "admitted"),
      ),
      ...record.cache_hits.map(({ id, tokens }) =>
        line("cache-hit", id, cacheHitText(tokens, preempted.has(id))),
      ),
      ...record.preempted.map(({ id, reason }) => line("preempted", id, names.sentence(reason))),
      ...record.finished.map(({ id, reason }) => line("finished", id, `finished: ${reason}`)),
    ];
  }

  function render() {
    empty.hidden = lines.length > 0;
    scroller.hidden = !lines.length;
    replace(list, [
      lines.map(({ step, kind, id, text }) => {
        if (kind === "gap") return h("li", {}, h("span", { class: "v-log-gap", text }));
        return h("li", { class: selected && selected !== id ? "v-faded" : null }, [
          h("button", {
            class: "bare v-log-step",
            text: formatCount(step),
            "aria-label": `Replay step ${step}`,
            onclick: () => onWatch(step),
          }),
          h("button", {
            class: "bare v-name",
            text: names.name(id),
            title: id,
            vars: { "--owner": `var(--cat-${names.color(id)})` },
            onclick: () => onSelect(id),
          }),
          h("span", { class: `v-log-${kind}`, text }),
        ]);
      }),
    ]);
  }

  return {
    element: h("div", {}, empty, scroller),
    /**
     * @param {StepRecord[]} records oldest first
     * @param {number | null} watched
     * @param {number} loadedUntil the last of the steps whose gaps were not recorded
     */
    update(records, watched, loadedUntil) {
      /** @type {Line[]} */
      const allLines = [];
      const preempted = new Set();
      records.forEach((record, index) => {
        const { step } = record;
        if (watched !== null && step > watched) return;
        const missing = index ? step - records[index - 1].step - 1 : 0;
        if (missing) addGap(allLines, step, missing, step <= loadedUntil);
        allLines.push(...linesOf(record, preempted));
        for (const { id } of record.preempted) preempted.add(id);
      });
      lines = allLines.slice(-MAX_LINES).reverse();
      const key = lines.map(({ step, kind, text }) => `${step} ${kind} ${text}`).join();
      if (key === drawn) return;
      drawn = key;
      render();
    },
    /** @param {string | null} id */
    select(id) {
      selected = id;
      render();
    },
  };
}

/** @param {number} tokens @param {boolean} isResumed */
function cacheHitText(tokens, isResumed) {
  return isResumed
    ? `resumed: ${formatCount(tokens)} of its tokens were still cached`
    : `found ${formatCount(tokens)} prompt tokens in the prefix cache`;
}

/**
 * Add a line for omitted steps; gaps without an event between them are one line.
 * @param {Line[]} lines
 * @param {number} step
 * @param {number} missing
 * @param {boolean} isLoaded
 */
function addGap(lines, step, missing, isLoaded) {
  const last = lines.at(-1);
  const isSame = last?.kind === "gap" && last.isLoaded === isLoaded;
  const count = missing + ((isSame && lines.pop()?.count) || 0);
  const steps = formatThings(count, "step");
  const text = isLoaded ? `${steps} not recorded` : `… ${steps} not shown`;
  lines.push({ step, kind: "gap", id: "", text, count, isLoaded });
}
