/** The chart of the probability of each token along a text, with a logarithmic axis. */

import { h, replace, s } from "../elements/dom.js";
import { formatPercent, formatThings } from "../elements/format.js";
import { hideTooltip, showTooltip } from "../elements/overlays.js";
import { ticks } from "./scales.js";

/** @import { Word } from "../elements/format.js" */

const PLOT_HEIGHT = 110;
const MARGIN = { top: 12, right: 12, left: 84 };
const POSITIONS_HEIGHT = 34; // of the axis below the plot
const NAMES_HEIGHT = 64;
const MIN_WIDTH = 80;
const MIN_NAME_STEP = 15; // between two names of tokens
const MIN_POSITION_STEP = 70;
const MAX_NAME_CHARACTERS = 10;
const MAX_DECADES = 6;
const NUM_WORDS = 3;
/** Least probability of each colour of the sequential scale, but the first. */
const COLOR_STEPS = [0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.9];

/**
 * The tokens of a text: log-probabilities in nats, null where there is none; the position of the
 * first token; a token in one line, and in the word that contains it.
 * @typedef {{logprobs: (number | null)[], firstPosition: number,
 *   nameOf: (index: number) => string, wordOf: (index: number) => Word}} Text
 * @typedef {{index: number, logprob: number, x: number, y: number}} Point
 */

const noWord = () => ({ before: "", token: "", after: "" });

/** Return the number of a probability's colour in the sequential scale. @param {number} p */
export function probabilityColor(p) {
  return COLOR_STEPS.filter((step) => p >= step).length;
}

/**
 * Return a chart. The pointer at a token shows its details, a click chooses it.
 * @param {{details: (index: number) => Node, onselect: (index: number) => void,
 *   onpoint?: (index: number | null) => void, hasNames?: boolean}} options `hasNames` writes tokens
 *   below the axis instead of positions
 */
export function probabilityChart({ details, onselect, onpoint = () => {}, hasNames = false }) {
  const height = MARGIN.top + PLOT_HEIGHT + (hasNames ? NAMES_HEIGHT : POSITIONS_HEIGHT);
  const bottom = MARGIN.top + PLOT_HEIGHT;
  const label = { role: "img", "aria-label": "Probability of each token" }; // until it is drawn
  const svg = s("svg", { class: "chart probability-chart", height, ...label });
  const element = h("figure", { class: "chart-figure" }, svg);
  /** @type {Text} */
  let text = { logprobs: [], firstPosition: 0, nameOf: String, wordOf: noWord };
  let width = 0;

  const right = () => width - MARGIN.right;
  const step = () => Math.max(right() - MARGIN.left, 1) / Math.max(text.logprobs.length, 1);
  /** @param {number} index */
  const xOf = (index) => MARGIN.left + (index + 0.5) * step();

  /** Mark a token with a vertical line. @param {number | null} index */
  function mark(index) {
    const line = svg.querySelector(".cursor");
    line?.classList.toggle("shown", index !== null);
    if (index === null) return;
    for (const end of ["x1", "x2"]) line?.setAttribute(end, String(xOf(index)));
  }

  /** @param {PointerEvent} event @returns {number | null} */
  function indexAt(event) {
    const index = Math.floor(
      (event.clientX - svg.getBoundingClientRect().left - MARGIN.left) / step(),
    );
    return index >= 0 && index < text.logprobs.length ? index : null;
  }

  /** @param {number | null} index */
  function point(index) {
    mark(index);
    onpoint(index);
    if (index === null) return hideTooltip();
    const { left, top } = svg.getBoundingClientRect();
    showTooltip(
      new DOMRect(left + xOf(index), top + MARGIN.top, 0, height - MARGIN.top),
      details(index),
    );
  }

  function draw() {
    replace(svg);
    const known = text.logprobs.flatMap((logprob, index) =>
      logprob === null ? [] : [{ index, logprob }],
    );
    element.hidden = !known.length;
    if (element.hidden || width < MIN_WIDTH) return;
    const low = known.reduce((least, each) => (each.logprob < least.logprob ? each : least));
    const decades = Math.min(Math.max(Math.ceil(-low.logprob / Math.LN10), 2), MAX_DECADES);
    /** @param {number} logprob */
    const yOf = (logprob) => MARGIN.top + Math.min(-logprob / Math.LN10 / decades, 1) * PLOT_HEIGHT;
    const points = known.map((each) => ({ ...each, x: xOf(each.index), y: yOf(each.logprob) }));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute(
      "aria-label",
      `Probability of ${formatThings(text.logprobs.length, "token")}. The lowest is ` +
        `${formatPercent(Math.exp(low.logprob))} at position ` +
        `${text.firstPosition + low.index} (from 0), ${text.nameOf(low.index)}.`,
    );
    replace(
      svg,
      yAxis(decades, yOf),
      s("line", { class: "axis", x1: MARGIN.left, x2: right(), y1: bottom, y2: bottom }),
      hasNames ? names() : positions(),
      s("line", { class: "cursor", y1: MARGIN.top, y2: bottom }),
      s("polyline", { class: "line", points: points.map(({ x, y }) => `${x},${y}`).join(" ") }),
      points.map(({ x, y, logprob }) => {
        const color = probabilityColor(Math.exp(logprob));
        return s("circle", {
          class: `point seq-${color}`,
          cx: x,
          cy: y,
          r: points.length > 150 ? 2 : 3.5,
        });
      }),
      words(points),
    );
  }

  /** @param {number} decades @param {(logprob: number) => number} yOf */
  function yAxis(decades, yOf) {
    const every = decades > 4 ? 2 : 1;
    const middle = `translate(11 ${MARGIN.top + PLOT_HEIGHT / 2}) rotate(-90)`;
    const lines = Array.from({ length: Math.floor(decades / every) + 1 }, (_, index) => {
      const decade = index * every;
      const y = yOf(-decade * Math.LN10);
      const bound = decade === MAX_DECADES ? "≤ " : "";
      const label = `${bound}${Number((100 / 10 ** decade).toPrecision(1))}\u202F%`;
      return [
        s("line", { class: "grid", x1: MARGIN.left, x2: right(), y1: y, y2: y }),
        s("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, label),
      ];
    });
    return [lines, s("text", { transform: middle, "text-anchor": "middle" }, "probability")];
  }

  function positions() {
    const { firstPosition: first, logprobs } = text;
    const scale = { low: first, high: first + logprobs.length - 1, isLog: false };
    const room = Math.max((right() - MARGIN.left) / MIN_POSITION_STEP, 1);
    const round = ticks(scale, room, 1).filter((at) => xOf(at - first) - xOf(0) >= 30);
    const title = { x: (MARGIN.left + right()) / 2, y: height - 4, "text-anchor": "middle" };
    return [
      [first, ...round].map((at) =>
        s("text", { x: xOf(at - first), y: bottom + 15, "text-anchor": "middle" }, String(at)),
      ),
      s("text", title, "position (from 0)"),
    ];
  }

  function names() {
    const every = Math.ceil(MIN_NAME_STEP / step());
    return text.logprobs.map((_, index) => {
      if (index % every) return null;
      const name = text.nameOf(index);
      const isLong = name.length > MAX_NAME_CHARACTERS;
      const transform = `translate(${xOf(index) + 4} ${bottom + 12}) rotate(-45)`;
      return s("text", { class: "token-name-label", "text-anchor": "end", transform }, [
        isLong ? `${name.slice(0, MAX_NAME_CHARACTERS - 1)}…` : name,
      ]);
    });
  }

  /**
   * Return the tokens of the lowest probabilities in their words, above each other if necessary.
   * @param {Point[]} points
   */
  function words(points) {
    /** @type {{x: number, y: number, index: number}[]} */
    const placed = [];
    const lowest = [...points].sort((first, second) => first.logprob - second.logprob);
    for (const { x, y: start, index } of lowest.slice(0, NUM_WORDS)) {
      let y = start;
      const shift = y > height / 3 ? -13 : 13;
      while (placed.some((other) => Math.abs(other.x - x) < 120 && Math.abs(other.y - y) < 13)) {
        y += shift;
      }
      placed.push({ x, y, index });
    }
    return placed.map(({ x, y, index }) => {
      const { before, token, after } = text.wordOf(index);
      const isAtEnd = x > width - 110;
      const anchor = { x: isAtEnd ? x - 8 : x + 8, "text-anchor": isAtEnd ? "end" : "start" };
      const rest = (/** @type {string} */ part) => part && s("tspan", { class: "word-rest" }, part);
      return s("text", { ...anchor, y: y + 4, class: "mark" }, rest(before), token, rest(after));
    });
  }

  svg.addEventListener("pointermove", (event) => point(indexAt(event)));
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("click", (event) => {
    const index = indexAt(event);
    if (index !== null) onselect(index);
  });
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === width) return;
    width = now;
    draw();
  }).observe(element);

  return {
    element,
    mark,
    /** @param {Text} shown */
    update(shown) {
      text = shown;
      draw();
    },
  };
}
