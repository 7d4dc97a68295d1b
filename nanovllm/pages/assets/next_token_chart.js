/** The chart of the probability that the model gave to each token of the prompt. */

import { h, replace, s } from "./dom.js";
import { formatPercent, tokenLabel } from "./format.js";
import { hideTooltip, showTooltip } from "./overlays.js";

const CHART_HEIGHT_PX = 200;
const CHART_MARGIN = { left: 76, right: 16, top: 12, bottom: 64 };
const MIN_LABEL_STEP_PX = 15;
const MAX_LABEL_CHARACTERS = 10;
const LOWEST_PROBABILITY = 1e-6;

/** Return the model's probability of the token after each position; the last has none. */
export function nextProbabilities({ cells }) {
  return cells
    .at(-1)
    .slice(0, -1)
    .map(({ p_of_next: p }) => p);
}

/** Return the chart of the probability of each token, on a logarithmic axis. */
export function nextTokenChart(lens, onChoose) {
  const probabilities = nextProbabilities(lens);
  const frame = h("div", { class: "v-chart-frame" });
  if (!probabilities.length) return frame;
  const low = Math.max(Math.min(...probabilities), LOWEST_PROBABILITY);
  const decades = Math.max(Math.ceil(-Math.log10(low)), 1);
  const { left, right, top, bottom } = CHART_MARGIN;
  const nameOf = (index) => shortLabel(tokenLabel(lens.tokens[index + 1]));
  const labelsY = CHART_HEIGHT_PX - bottom + 12;
  const plotHeight = CHART_HEIGHT_PX - top - bottom;
  const yOf = (p) =>
    top + (Math.min(-Math.log10(Math.max(p, 1e-30)), decades) / decades) * plotHeight;

  function draw() {
    const width = frame.clientWidth;
    if (!width) return;
    const step = (width - left - right) / Math.max(probabilities.length, 1);
    const xOf = (index) => left + (index + 0.5) * step;
    const points = probabilities.map((p, index) => `${xOf(index)},${yOf(p)}`);
    const every = Math.ceil(MIN_LABEL_STEP_PX / step);
    const worst = probabilities.indexOf(Math.min(...probabilities));
    const ticks = Array.from({ length: decades + 1 }, (_, decade) => 10 ** -decade);
    replace(
      frame,
      s(
        "svg",
        {
          class: "chart v-line-chart",
          width,
          height: CHART_HEIGHT_PX,
          role: "img",
          "aria-label":
            `Probability of each token of the prompt. The lowest is ` +
            `${formatPercent(probabilities[worst])} at position ${worst + 1} (from 0).`,
        },
        ticks
          .map((p) => [
            s("line", { class: "grid", x1: left, x2: width - right, y1: yOf(p), y2: yOf(p) }),
            s("text", {
              x: left - 8,
              y: yOf(p) + 4,
              "text-anchor": "end",
              text: `${p <= LOWEST_PROBABILITY ? "≤ " : ""}${tickText(p)}`,
            }),
          ])
          .flat(),
        s("polyline", { class: "v-line", points: points.join(" ") }),
        probabilities.map((p, index) =>
          s("circle", {
            class: index === worst ? "v-dot v-worst" : "v-dot",
            cx: xOf(index),
            cy: yOf(p),
            r: index === worst ? 5 : Math.min(3, Math.max(step / 4, 1.2)),
          }),
        ),
        s("text", {
          class: "v-worst-label",
          x: xOf(worst) + (worst > probabilities.length / 2 ? -10 : 10),
          y: Math.max(yOf(low) - 10, 10),
          "text-anchor": worst > probabilities.length / 2 ? "end" : "start",
          text: `${nameOf(worst)} ${formatPercent(probabilities[worst])}`,
        }),
        probabilities.map(
          (_, index) =>
            index % every === 0 &&
            s(
              "text",
              {
                class: "v-x-label",
                "text-anchor": "end",
                transform: `translate(${xOf(index) + 4} ${labelsY}) rotate(-45)`,
              },
              nameOf(index),
            ),
        ),
        probabilities.map((p, index) =>
          s("rect", {
            class: "v-hit",
            x: left + index * step,
            y: top,
            width: step,
            height: plotHeight,
            onclick: () => onChoose(index),
            onpointerenter: (event) =>
              showTooltip(
                event.target,
                `${nameOf(index)}, position ${index + 1} (from 0): ${formatPercent(p)}`,
              ),
            onpointerleave: hideTooltip,
          }),
        ),
      ),
    );
  }
  new ResizeObserver(draw).observe(frame);
  return h(
    "div",
    { class: "v-chart" },
    h("p", { class: "v-axis", text: "↑ probability (logarithmic)" }),
    frame,
    h("p", { class: "v-axis v-axis-x", text: "token of the prompt →" }),
  );
}

function tickText(p) {
  return `${Number((p * 100).toPrecision(1))} %`;
}

function shortLabel(text) {
  return text.length > MAX_LABEL_CHARACTERS ? `${text.slice(0, MAX_LABEL_CHARACTERS - 1)}…` : text;
}
