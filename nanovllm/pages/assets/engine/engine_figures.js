/** The figures at the head of the engine view, each with a line of its last values. */

import { sparkline } from "../charts/histogram.js";
import { h } from "../elements/dom.js";
import { formatCount, formatPercent, formatThings } from "../elements/format.js";

/** @import { State } from "./replay.js" */

const SPARK_FRAMES = 100;

/**
 * Each figure: its value in a state, its text, and the value at the upper edge of its line.
 * @type {{name: string, label: string, unit: string, value: (state: State) => number,
 *   text: (value: number) => string, top?: (state: State) => number,
 *   note: (state: State) => string}[]}
 */
const FIGURES = [
  {
    name: "tokens",
    label: "Generation",
    unit: "tokens/s",
    value: (state) => state.rates.tokens_per_s,
    text: (value) => formatCount(value),
    note: (state) => `${formatCount(state.rates.prompt_tokens_per_s)} prompt tokens/s`,
  },
  {
    name: "running",
    label: "Running",
    unit: "sequences",
    value: (state) => countState(state, "running"),
    text: String,
    top: (state) => state.config.max_num_seqs,
    note: (state) => `of at most ${state.config.max_num_seqs}`,
  },
  {
    name: "waiting",
    label: "Waiting",
    unit: "sequences",
    value: (state) => countState(state, "waiting") + state.requests_omitted,
    text: String,
    note: (state) => {
      const first = state.requests.find((request) => request.state === "waiting");
      return first ? "the list below says why" : "none waits";
    },
  },
  {
    name: "blocks",
    label: "KV cache",
    unit: "blocks",
    value: (state) => state.blocks.used,
    text: formatCount,
    top: (state) => state.blocks.total,
    note: (state) => partText(state.blocks),
  },
  {
    name: "hits",
    label: "Prefix-cache hits",
    unit: "",
    value: hitRate,
    text: (value) => formatPercent(value),
    top: () => 1,
    note: (state) =>
      `${formatCount(state.totals.prefix_cache_hits)} of ` +
      `${formatThings(state.totals.prefix_cache_queries, "token")}`,
  },
  {
    name: "preemptions",
    label: "Preemptions",
    unit: "",
    value: (state) => state.totals.preemptions,
    text: formatCount,
    note: () => "since the start",
  },
];

/** Return the figures, and a sentence about the blocks. */
export function engineFigures() {
  const tiles = FIGURES.map(({ name, label, unit }) => {
    const number = h("span", { dataset: { figure: name } });
    const note = h("dd", { class: "secondary small-text" });
    const line = sparkline();
    const element = h("div", { class: "card v-tile" }, [
      h("dt", { text: label }),
      h("dd", { class: "v-tile-value" }, [
        number,
        unit && h("span", { class: "v-unit", text: ` ${unit}` }),
      ]),
      note,
      h("dd", {}, line.element),
    ]);
    return { element, number, note, line };
  });
  const blockNote = h("p", { class: "secondary v-lead" });
  return {
    element: h("dl", { class: "v-tiles" }, [tiles.map(({ element }) => element)]),
    blockNote,
    /** @param {State} state @param {State[]} frames */
    update(state, frames) {
      const until = frames.indexOf(state) + 1;
      const recent = frames.slice(Math.max(until - SPARK_FRAMES, 0), until);
      FIGURES.forEach(({ value, text, note, top }, index) => {
        const tile = tiles[index];
        tile.number.textContent = text(value(state));
        tile.note.textContent = note(state);
        tile.line.update(recent.map(value), top?.(state));
      });
      const { block_size: blockSize } = state.config;
      blockNote.textContent = `A block holds the keys and values of ${blockSize} tokens.`;
    },
  };
}

/** @param {{used: number, total: number}} blocks */
function partText({ used, total }) {
  return `${formatPercent(used / total)} of ${formatCount(total)}`;
}

/** @param {State} state @param {string} name */
function countState(state, name) {
  return state.requests.filter((request) => request.state === name).length;
}

/** @param {State} state */
function hitRate({ totals }) {
  return totals.prefix_cache_queries ? totals.prefix_cache_hits / totals.prefix_cache_queries : 0;
}
