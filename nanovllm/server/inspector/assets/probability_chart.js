/**
 * A chart of the probability of each token along the text, with a logarithmic axis.
 */

import { h, replace, s } from "./dom.js";
import { formatPercent } from "./format.js";
import { hideTooltip, showTooltip } from "./overlays.js";
import { colorIndex } from "./token_text.js";

const HEIGHT = 156;
const MARGIN = { top: 12, right: 12, bottom: 34, left: 84 };
const MAX_DECADES = 6;
const NUM_LABELS = 3;

/** Chart of one choice. */
export class ProbabilityChart {
  /**
   * @param {{vocabulary: import("./vocabulary.js").Vocabulary,
   *   onpoint: (position: number | null) => void,
   *   details: (token: import("./generation.js").Token) => Node,
   *   onselect: (position: number) => void}} options
   */
  constructor({ vocabulary, onpoint, details, onselect }) {
    this.vocabulary = vocabulary;
    this.onpoint = onpoint;
    this.details = details;
    /** @type {import("./generation.js").Token[]} */
    this.tokens = [];
    this.firstPosition = 0;
    this.width = 0;
    this.svg = s("svg", { class: "chart probability-chart", height: HEIGHT, role: "img" });
    this.element = h("figure", { class: "chart-figure" }, this.svg);
    this.svg.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      this.#move(this.#positionAt(event));
    });
    this.svg.addEventListener("pointerleave", () => {
      hideTooltip();
      this.mark(null);
      this.onpoint(null);
    });
    this.svg.addEventListener("click", (/** @type {PointerEvent} */ event) => {
      const position = this.#positionAt(event);
      if (position !== null) onselect(position);
    });
    new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width === this.width) return;
      this.width = width;
      this.#draw();
    }).observe(this.element);
  }

  /**
   * @param {import("./generation.js").Token[]} tokens
   * @param {number} firstPosition position of the first token, after those of the prompt
   */
  update(tokens, firstPosition) {
    this.tokens = tokens;
    this.firstPosition = firstPosition;
    this.element.hidden = !tokens.some((token) => token.logprob !== null);
    this.#draw();
  }

  /** Mark a token with a vertical line. @param {number | null} position */
  mark(position) {
    const line = this.svg.querySelector(".cursor");
    if (!line) return;
    line.classList.toggle("shown", position !== null);
    if (position === null) return;
    line.setAttribute("x1", this.#x(position));
    line.setAttribute("x2", this.#x(position));
  }

  /** @param {PointerEvent} event */
  #positionAt(event) {
    const offset = event.clientX - this.svg.getBoundingClientRect().left - MARGIN.left;
    const step = this.#plotWidth() / Math.max(this.tokens.length, 1);
    const position = Math.floor(offset / step);
    return position >= 0 && position < this.tokens.length ? position : null;
  }

  /** @param {number | null} position */
  #move(position) {
    this.mark(position);
    this.onpoint(position);
    if (position === null) {
      hideTooltip();
      return;
    }
    const box = this.svg.getBoundingClientRect();
    const left = box.left + this.#x(position);
    const anchor = new DOMRect(left, box.top + MARGIN.top, 0, HEIGHT - MARGIN.top);
    showTooltip(anchor, this.details(this.tokens[position]));
  }

  #plotWidth() {
    return Math.max(this.width - MARGIN.left - MARGIN.right, 1);
  }

  /** @param {number} position */
  #x(position) {
    return MARGIN.left + ((position + 0.5) * this.#plotWidth()) / Math.max(this.tokens.length, 1);
  }

  #draw() {
    const { tokens, svg } = this;
    replace(svg);
    if (this.element.hidden || this.width < 80 || !tokens.length) return;
    const points = tokens
      .map((token, position) => ({ token, position, logprob: token.logprob }))
      .filter((point) => point.logprob !== null);
    const lowest = Math.min(...points.map((point) => point.logprob)) / Math.LN10;
    const decades = Math.min(Math.max(Math.ceil(-lowest), 2), MAX_DECADES);
    const plotHeight = HEIGHT - MARGIN.top - MARGIN.bottom;
    const y = (/** @type {number} */ logprob) =>
      MARGIN.top + (Math.min(-logprob / Math.LN10, decades) / decades) * plotHeight;
    const bottom = MARGIN.top + plotHeight;
    const right = this.width - MARGIN.right;
    svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    svg.append(
      ...this.#axes(decades, bottom, right, y),
      s("line", { class: "cursor", y1: MARGIN.top, y2: bottom }),
      s("polyline", {
        class: "line",
        points: points.map((point) => `${this.#x(point.position)},${y(point.logprob)}`).join(" "),
      }),
      ...points.map((point) =>
        s("circle", {
          class: `point seq-${colorIndex(point.token, "probability")}`,
          cx: this.#x(point.position),
          cy: y(point.logprob),
          r: points.length > 150 ? 2 : 3.5,
        }),
      ),
      ...this.#labels(points, y),
    );
    const low = points.reduce((least, point) => (point.logprob < least.logprob ? point : least));
    svg.setAttribute(
      "aria-label",
      `Probability of ${tokens.length} tokens. The lowest is `
        + `${formatPercent(Math.exp(low.logprob))} at position `
        + `${this.firstPosition + low.position} (from 0), `
        + `${this.vocabulary.label(low.token.id)}.`,
    );
  }

  /**
   * @param {number} decades
   * @param {number} bottom
   * @param {number} right
   * @param {(logprob: number) => number} y
   */
  #axes(decades, bottom, right, y) {
    const parts = [];
    for (let decade = 0; decade <= decades; decade += decades > 4 ? 2 : 1) {
      const height = y(-decade * Math.LN10);
      const bound = decade === MAX_DECADES ? "≤ " : "";
      const label = `${bound}${Number((100 / 10 ** decade).toPrecision(1))}\u202F%`;
      parts.push(
        s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: height, y2: height }),
        s("text", { x: MARGIN.left - 8, y: height + 4, "text-anchor": "end" }, label),
      );
    }
    const count = this.tokens.length;
    const step = niceStep(count / Math.max(this.#plotWidth() / 70, 1));
    const first = this.firstPosition;
    for (let index = 0; index < count; index += 1) {
      const x = this.#x(index);
      if (index && ((first + index) % step || x - this.#x(0) < 30)) continue;
      parts.push(s("text", { x, y: bottom + 15, "text-anchor": "middle" }, String(first + index)));
    }
    const middle = (MARGIN.left + right) / 2;
    parts.push(
      s("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
      s("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, "position (from 0)"),
      s(
        "text",
        { transform: `translate(11 ${(MARGIN.top + bottom) / 2}) rotate(-90)`,
          "text-anchor": "middle" },
        "probability",
      ),
    );
    return parts;
  }

  /**
   * Return the names of the tokens with the lowest probabilities, above each other if necessary.
   * @param {{token: import("./generation.js").Token, position: number, logprob: number}[]} points
   * @param {(logprob: number) => number} y
   */
  #labels(points, y) {
    const placed = [];
    const ids = this.tokens.map((token) => token.id);
    const order = [...points].sort((first, second) => first.logprob - second.logprob);
    for (const point of order.slice(0, NUM_LABELS)) {
      const x = this.#x(point.position);
      let height = y(point.logprob);
      const overlaps = (other) => Math.abs(other.x - x) < 120 && Math.abs(other.y - height) < 13;
      const shift = height > HEIGHT / 3 ? -13 : 13;
      while (placed.some(overlaps)) height += shift;
      placed.push({ x, y: height, word: this.vocabulary.word(ids, point.position) });
    }
    return placed.map(({ x, y: height, word: { before, token, after } }) => {
      const isRight = x > this.width - 110;
      const text = { x: isRight ? x - 8 : x + 8, y: height + 4 };
      return s("text", { ...text, class: "mark", "text-anchor": isRight ? "end" : "start" },
        before && s("tspan", { class: "word-rest" }, before),
        token,
        after && s("tspan", { class: "word-rest" }, after),
      );
    });
  }
}

/** Return 1, 2, 5, 10, 20 … that is at least `least`. @param {number} least */
function niceStep(least) {
  for (let power = 1; ; power *= 10) {
    for (const factor of [1, 2, 5]) if (factor * power >= least) return factor * power;
  }
}
