/** Logit lens: what each layer would predict, and the probability of each token that follows. */

import { colorScale, onThemeChange } from "../charts/colors.js";
import { scaleLegend } from "../charts/heatmap.js";
import { probabilityChart } from "../charts/probability_chart.js";
import { card, segmented, shareList, tokenInWord } from "../elements/components.js";
import { h, keyMove, replace, targetOf } from "../elements/dom.js";
import {
  formatCount,
  formatNumber,
  formatPercent,
  formatThings,
  tokenLabel,
  wordAround,
} from "../elements/format.js";
import { hideTooltip, openPopover, showTooltip } from "../elements/overlays.js";
import { ablationOf } from "./ablation_card.js";
import { promptForm } from "./prompt_form.js";

const NUM_SURPRISES = 3;
const LEAST_PROBABILITY = 1e-30; // whose logarithm is drawn
const TOP = 5;
const LAYERS_LEAD =
  "Below each token, the most likely next token if the forward pass ended after that layer. The " +
  "row embeddings mostly repeats the input token where the output head is the token embedding, as " +
  "in GPT-2. The last row is the model's prediction. Choose a cell for its most likely tokens. " +
  "Home and End move to the first and the last token.";
/** @type {Record<string, [number, number]>} */
const ENDS = { Home: [0, -Infinity], End: [0, Infinity] };

/**
 * @import { Token } from "../elements/format.js"
 * @typedef {{top: (Token & {p: number})[], entropy: number, rank_of_next: number | null,
 *   p_of_next: number | null}} Cell
 * @typedef {{tokens: Token[], layers: string[], cells: Cell[][]}} Lens
 * @typedef {{maxEntropy: number, maxRank: number}} Extremes
 */

/**
 * Return an explorer of a response of POST /v1/inspect/logit_lens.
 * @param {Lens} lens
 * @returns {HTMLElement}
 */
export function lensExplorer(lens) {
  const table = lensTable(lens);
  const legend = h("div");
  /** @param {string} metric */
  const show = (metric) => {
    table.color(metric);
    replace(legend, metricLegend(lens, metric));
  };
  const options = Object.entries(LENS_METRICS).map(([value, { label }]) => ({ value, label }));
  show("p");
  onThemeChange(table.element, table.recolor);
  return h("div", { class: "stack" }, [
    card("Where the prompt surprises the model", {}, [
      summary(lens, table.choose),
      nextTokenChart(lens, table.choose),
    ]),
    card("What each layer predicts next", { lead: LAYERS_LEAD }, [
      h("div", { class: "row between v-lead" }, [
        segmented({ label: "Colour the cells by", options, value: "p", onchange: show }),
        legend,
      ]),
      table.element,
    ]),
  ]);
}

/**
 * Return the model's probability of the token after each position; the last has none.
 * @param {Lens} lens
 */
function nextProbabilities({ cells }) {
  return cells[cells.length - 1].slice(0, -1).map(({ p_of_next: p }) => p ?? 0);
}

/**
 * Return the chart of the probability of each token of the prompt, but the first.
 * @param {Lens} lens
 * @param {(position: number) => void} onChoose
 */
function nextTokenChart(lens, onChoose) {
  const logprobs = nextProbabilities(lens).map((p) => Math.log(Math.max(p, LEAST_PROBABILITY)));
  /** @param {number} index */
  const nameOf = (index) => tokenLabel(lens.tokens[index]);
  const chart = probabilityChart({
    hasNames: true,
    onselect: (index) => index && onChoose(index - 1),
    details: (index) => {
      const chance = index ? formatPercent(Math.exp(logprobs[index - 1])) : "no probability";
      return h("div", { text: `${nameOf(index)}, position ${index} (from 0): ${chance}` });
    },
  });
  /** @param {number} index */
  const wordOf = (index) => wordAt(lens.tokens, index);
  chart.update({ logprobs: [null, ...logprobs], firstPosition: 0, nameOf, wordOf });
  return chart.element;
}

/**
 * What colours a cell: its value, the value's place on the scale, and the ticks of the legend.
 * @type {Record<string, {label: string, legend: string,
 *   fraction: (cell: Cell, extremes: Extremes) => number | null,
 *   ticks: (extremes: Extremes) => {at: number, text: string}[]}>}
 */
const LENS_METRICS = {
  p: {
    label: "Probability",
    legend: "probability of the predicted token",
    fraction: (cell) => cell.top[0].p,
    ticks: () => [0, 0.25, 0.5, 0.75, 1].map((p) => ({ at: p, text: `${p * 100} %` })),
  },
  entropy: {
    label: "Entropy",
    legend: "entropy of the prediction, nats",
    fraction: (cell, { maxEntropy }) => 1 - cell.entropy / maxEntropy,
    ticks: ({ maxEntropy }) =>
      [1, 0.5, 0].map((part) => ({ at: 1 - part, text: formatNumber(part * maxEntropy, 2) })),
  },
  rank: {
    label: "Rank of next",
    legend: "rank of the token that follows",
    fraction: (cell, { maxRank }) =>
      cell.rank_of_next === null ? null : 1 - Math.log(cell.rank_of_next) / Math.log(maxRank),
    ticks: ({ maxRank }) =>
      [maxRank, Math.round(Math.sqrt(maxRank)), 1].map((rank) => ({
        at: 1 - Math.log(rank) / Math.log(maxRank),
        text: formatCount(rank),
      })),
  },
};

/** @param {Lens} lens */
function lensExtremes({ cells }) {
  const all = cells.flat();
  return {
    maxEntropy: Math.max(...all.map(({ entropy }) => entropy), 1e-9),
    maxRank: Math.max(...all.map(({ rank_of_next: rank }) => rank ?? 1), 2),
  };
}

/** @param {Lens} lens @param {string} metric */
function metricLegend(lens, metric) {
  const { legend, ticks } = LENS_METRICS[metric];
  return h(
    "div",
    { class: "v-tinted" },
    scaleLegend({ label: legend, ticks: ticks(lensExtremes(lens)) }),
  );
}

/** @param {Lens} lens @param {(position: number) => void} onChoose */
function summary(lens, onChoose) {
  const probabilities = nextProbabilities(lens);
  if (!probabilities.length) {
    return h("p", {
      class: "secondary v-lead",
      text: "A prompt of one token has no next token to predict.",
    });
  }
  const sum = probabilities.reduce(
    (total, p) => total + Math.log(Math.max(p, LEAST_PROBABILITY)),
    0,
  );
  const order = probabilities.map((_, position) => position);
  order.sort((a, b) => probabilities[a] - probabilities[b]);
  const surprises = order
    .slice(0, NUM_SURPRISES)
    .map((position) =>
      h("button", { class: "pill v-surprise", onclick: () => onChoose(position) }, [
        tokenInWord(wordAt(lens.tokens, position + 1)),
        h("strong", { text: formatPercent(probabilities[position]) }),
        h("span", { class: "secondary", text: `position ${position + 1} (from 0)` }),
      ]),
    );
  return h("div", { class: "v-lead" }, [
    h("p", {
      class: "secondary",
      text:
        "The line shows the probability that the model gave to each token of " +
        "the prompt, given the tokens before it. It drops where the prompt becomes unlikely. " +
        `Perplexity ${formatNumber(Math.exp(-sum / probabilities.length))} over ` +
        `${formatThings(probabilities.length, "token")}.`,
    }),
    h("p", { class: "row v-surprises" }, h("span", { text: "Least expected:" }), surprises),
  ]);
}

/** Return a token of a prompt in its word. @param {Token[]} tokens @param {number} index */
function wordAt(tokens, index) {
  return wordAround(index, tokens.length, (each) => ({
    text: tokens[each].bytes ? null : tokens[each].text,
    label: tokenLabel(tokens[each]),
  }));
}

/** @param {Lens} lens */
function lensTable(lens) {
  const { tokens, layers, cells } = lens;
  const extremes = lensExtremes(lens);
  let metric = "p";
  const rows = layers.map((name, row) =>
    h("tr", { class: row === layers.length - 1 ? "v-output-row" : null }, [
      h("th", { scope: "row", text: name }),
      cells[row].map((cell, position) =>
        h("td", {
          class: "v-shaded",
          tabindex: row || position ? -1 : 0,
          dataset: { row, position },
          text: tokenLabel(cell.top[0]),
          "aria-label":
            `${name}, after ${tokenLabel(tokens[position])}: ` +
            `${tokenLabel(cell.top[0])}, ${formatPercent(cell.top[0].p)}`,
        }),
      ),
    ]),
  );
  const table = h(
    "table",
    { class: "v-lens", role: "grid", "aria-label": "Most likely next token by layer and position" },
    h("thead", {}, [
      h("tr", {}, [
        h("th", { scope: "col", text: "token" }),
        tokens.map((token, position) =>
          h("th", {
            scope: "col",
            title: `position ${position} (from 0)`,
            text: tokenLabel(token),
          }),
        ),
      ]),
    ]),
    h("tbody", {}, rows),
    h("tfoot", {}, [
      h("tr", {}, [
        h("th", { scope: "row", text: "actual next" }),
        [...tokens.slice(1).map(tokenLabel), "–"].map((text) => h("th", { text })),
      ]),
      h("tr", {}, [
        h("th", { scope: "row", text: "its probability" }),
        cells[cells.length - 1].map(({ p_of_next: p }) =>
          h("th", { text: p === null ? "–" : formatPercent(p) }),
        ),
      ]),
    ]),
  );
  const scroller = h("div", { class: "v-lens-scroll", dataset: { around: "" } }, table);
  /** @param {number} row @param {number} position */
  const cellAt = (row, position) => /** @type {HTMLElement} */ (rows[row]?.children[position + 1]);
  /** @param {HTMLElement} target */
  const placeOf = (target) => ({
    row: Number(target.dataset.row),
    position: Number(target.dataset.position),
  });

  function recolor() {
    const colorOf = colorScale();
    const { fraction } = LENS_METRICS[metric];
    for (const [row, line] of cells.entries()) {
      for (const [position, cell] of line.entries()) {
        const value = fraction(cell, extremes);
        const shade = value === null ? "transparent" : colorOf(value);
        cellAt(row, position).style.setProperty("--shade", shade);
      }
    }
  }
  /** @param {HTMLElement} target */
  function open(target) {
    hideTooltip();
    const { row, position } = placeOf(target);
    focus(row, position);
    const close = openPopover({
      anchor: target,
      label: "Most likely next tokens",
      content: cellDetails(lens, row, position),
      onkey(event) {
        const move = keyMove(event, ENDS);
        if (!move) return;
        event.preventDefault();
        close();
        moveFrom(target, move);
      },
    });
  }
  /** @param {HTMLElement} target @param {[number, number]} move in rows and in positions */
  function moveFrom(target, [down, right]) {
    const { row, position } = placeOf(target);
    focus(row + down, Math.max(Math.min(position + right, tokens.length - 1), 0));
  }
  /** @param {number} row @param {number} position */
  function focus(row, position) {
    const target = cellAt(row, position);
    if (!target) return;
    for (const cell of table.querySelectorAll("td")) cell.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }

  table.addEventListener("click", (event) => {
    const target = targetOf(event).closest("td");
    if (target) open(target);
  });
  table.addEventListener("keydown", (event) => {
    const target = targetOf(event).closest("td");
    const move = keyMove(event, ENDS);
    if (!target || (!move && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (move) moveFrom(target, move);
    else open(target);
  });
  table.addEventListener("pointerover", (event) => {
    const target = targetOf(event).closest("td");
    if (!target) return hideTooltip();
    const { row, position } = placeOf(target);
    showTooltip(
      target,
      h("div", { text: target.getAttribute("aria-label") }),
      h("div", { class: "secondary", text: nextText(lens, row, position) }),
    );
  });
  table.addEventListener("pointerleave", hideTooltip);
  return {
    element: scroller,
    recolor,
    /** @param {string} name */
    color(name) {
      metric = name;
      recolor();
    },
    /** Scroll to a position and focus the model's prediction there. @param {number} position */
    choose(position) {
      focus(layers.length - 1, position);
      cellAt(layers.length - 1, position).scrollIntoView({ block: "nearest", inline: "center" });
    },
  };
}

/** @param {Lens} lens @param {number} row @param {number} position */
function nextText({ tokens, cells }, row, position) {
  const cell = cells[row][position];
  if (cell.rank_of_next === null) return "The prompt ends here.";
  return (
    `The prompt goes on with ${tokenLabel(tokens[position + 1])}: rank ` +
    `${formatCount(cell.rank_of_next)}, ${formatPercent(cell.p_of_next ?? 0)}.`
  );
}

/** @param {Lens} lens @param {number} row @param {number} position */
function cellDetails(lens, row, position) {
  const { top, entropy } = lens.cells[row][position];
  const after = `After ${tokenLabel(lens.tokens[position])} the most likely are:`;
  return h("div", { class: "stack tight" }, [
    h("h3", { text: `${lens.layers[row]}, position ${position} (from 0)` }),
    h("p", { class: "secondary", text: after }),
    shareList(
      top,
      ({ p }) => p,
      formatPercent,
      (token) => h("code", { text: tokenLabel(token) }),
    ),
    h("p", { text: nextText(lens, row, position) }),
    h("p", { class: "secondary", text: `Entropy ${formatNumber(entropy)} nats` }),
  ]);
}

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function lensView(context) {
  return promptForm({
    context,
    action: "Show logit lens",
    hint:
      "Shows where the prompt becomes improbable, and what each layer would predict: its hidden " +
      "state goes through the final normalization and the output head.",
    async compute(prompt, signal) {
      const lens = await context.api.post(
        "v1/inspect/logit_lens",
        { prompt, top: TOP },
        { signal },
      );
      const ablation = ablationOf(context, prompt, signal);
      return h("div", { class: "stack" }, lensExplorer(lens), ablation.element);
    },
  });
}
