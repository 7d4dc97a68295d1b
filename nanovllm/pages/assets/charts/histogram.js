/** Histograms of times with logarithmic buckets, and sparklines. */

import { card } from "../elements/components.js";
import { h, replace, s } from "../elements/dom.js";
import { formatCount, formatDuration } from "../elements/format.js";
import { hideTooltip, showTooltip } from "../elements/overlays.js";

/** @typedef {{bounds: number[], counts: number[]}} Buckets numbers of values up to each bound */

const HEIGHT = 150;
const MARGIN = { left: 44, right: 26, top: 10, bottom: 38 };

/**
 * Return a histogram of a time.
 * @param {{title: string, explanation: string, unit: string}} options `unit` is what is counted
 */
export function timeHistogram({ title, explanation, unit }) {
  const frame = h("div", { class: "v-chart-frame", hidden: true });
  const summary = h("p", { class: "secondary small-text" });
  /** @type {Buckets | null} */
  let data = null;

  function draw() {
    const width = frame.clientWidth;
    if (!data || !width) return;
    const { bounds, counts } = trim(data);
    const peak = Math.max(...counts, 1);
    const step = (width - MARGIN.left - MARGIN.right) / counts.length;
    const bottom = HEIGHT - MARGIN.bottom;
    /** @param {number} count */
    const heightOf = (count) => (count / peak) * (bottom - MARGIN.top);
    /** @param {number} index */
    const edge = (index) => MARGIN.left + index * step;
    const every = Math.ceil(46 / step);
    replace(
      frame,
      s(
        "svg",
        {
          class: "chart",
          width,
          height: HEIGHT,
          role: "img",
          "aria-label": `${title}: ${summary.textContent}`,
        },
        [0, peak].flatMap((count) => [
          s("line", {
            class: count ? "grid" : "axis",
            x1: MARGIN.left,
            x2: width - MARGIN.right,
            y1: bottom - heightOf(count),
            y2: bottom - heightOf(count),
          }),
          s("text", {
            x: MARGIN.left - 6,
            y: bottom - heightOf(count) + 4,
            "text-anchor": "end",
            text: formatCount(count),
          }),
        ]),
        counts.map((count, index) =>
          s("rect", {
            class: "v-histogram-bar",
            x: edge(index) + 1,
            width: Math.max(step - 2, 1),
            rx: 2,
            y: bottom - heightOf(count),
            height: heightOf(count),
          }),
        ),
        bounds.map(
          (bound, index) =>
            index % every === 0 &&
            s("text", {
              x: edge(index + 1),
              y: bottom + 16,
              "text-anchor": "middle",
              text: formatDuration(bound),
            }),
        ),
        s("text", {
          x: (MARGIN.left + width - MARGIN.right) / 2,
          y: HEIGHT - 4,
          "text-anchor": "middle",
          text: `${unit} by time (logarithmic)`,
        }),
        counts.map((count, index) =>
          s("rect", {
            class: "v-hit",
            x: edge(index),
            width: step,
            y: MARGIN.top,
            height: bottom - MARGIN.top,
            onpointerenter: (/** @type {any} */ event) =>
              showTooltip(
                event.target,
                `${bucketName(bounds, index)}: ${formatCount(count)} ${unit}`,
              ),
            onpointerleave: hideTooltip,
          }),
        ),
      ),
    );
  }
  new ResizeObserver(draw).observe(frame);
  return {
    element: card(title, {}, [
      h("p", { class: "secondary small-text", text: explanation }),
      summary,
      frame,
    ]),
    /** @param {Buckets} newData */
    update(newData) {
      if (data && newData.counts.join() === data.counts.join()) return;
      data = newData;
      const total = sum(data.counts);
      summary.textContent = total
        ? `${formatCount(total)} ${unit}, median ${quantileText(data, 0.5)}, ` +
          `95 % ${quantileText(data, 0.95)}`
        : `No ${unit} yet.`;
      frame.hidden = !total;
      draw();
    },
  };
}

/**
 * Drop empty buckets at both ends; keep at least six, so that the axis does not jump.
 * @param {Buckets} buckets
 */
function trim({ bounds, counts }) {
  let first = counts.findIndex((count) => count > 0);
  if (first < 0) return { bounds: bounds.slice(0, 9), counts: counts.slice(0, 9) };
  let last = counts.length - 1;
  while (counts[last] === 0) last -= 1;
  first = Math.max(first - 1, 0);
  last = Math.min(Math.max(last + 1, first + 5), counts.length - 1);
  return {
    bounds: bounds.slice(first, Math.min(last, bounds.length - 1) + 1),
    counts: counts.slice(first, last + 1),
  };
}

/** @param {number[]} numbers */
function sum(numbers) {
  return numbers.reduce((total, each) => total + each, 0);
}

/** @param {number[]} bounds @param {number} index */
function bucketName(bounds, index) {
  if (index >= bounds.length) return `above ${formatDuration(bounds[bounds.length - 1])}`;
  if (index === 0) return `at most ${formatDuration(bounds[0])}`;
  return `${formatDuration(bounds[index - 1])} to ${formatDuration(bounds[index])}`;
}

/**
 * Return the bucket's bound that contains a quantile, as text.
 * @param {Buckets} buckets
 * @param {number} quantile
 */
function quantileText({ bounds, counts }, quantile) {
  const total = sum(counts);
  const sumUntil = (/** @type {number} */ end) => sum(counts.slice(0, end + 1));
  const index = counts.findIndex((_, end) => sumUntil(end) >= quantile * total);
  return index < bounds.length
    ? `≤ ${formatDuration(bounds[index])}`
    : `> ${formatDuration(bounds[bounds.length - 1])}`;
}

/** Return a small line of the last values of a figure. */
export function sparkline() {
  const line = s("polyline", { class: "v-spark-line" });
  const element = s(
    "svg",
    { class: "v-spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    line,
  );
  return {
    element,
    /** @param {number[]} values @param {number} [top] the value at the upper edge */
    update(values, top = Math.max(...values, 1e-9)) {
      const step = 100 / Math.max(values.length - 1, 1);
      line.setAttribute(
        "points",
        values
          .map(
            (value, index) =>
              `${(index * step).toFixed(1)},${(22 - (value / top) * 20).toFixed(1)}`,
          )
          .join(" "),
      );
    },
  };
}
