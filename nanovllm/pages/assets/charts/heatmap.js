/**
 * Heat maps of attention weights on a canvas, thumbnails of them, and text shaded by weights.
 *
 * A weight w has the colour sqrt(w) of the sequential scale, so that small weights remain visible.
 */

import { h, keyMove, rovingFocus, s, uniqueId } from "../elements/dom.js";
import { tokenLabel, tokenText } from "../elements/format.js";
import { contextOf, oncePerFrame, resizeCanvas } from "./canvas.js";
import { onThemeChange, sequentialTable, token } from "./colors.js";

/** @import { Token } from "../elements/format.js" */

const MIN_CELL_PX = 1;
const WHOLE_CELL_PX = 2; // smaller cells need not be whole pixels
const MAX_CELL_PX = 30;
const MAX_SIDE_PX = 640;
const FRAME_PADDING_PX = 4; // of both sides of .v-map-frame
const LABEL_STEP_PX = 13;
const LABEL_FONT = "11px ui-monospace, Menlo, Consolas, monospace";
const SEQUENTIAL_STOPS = Array.from({ length: 9 }, (_, index) => `seq-${index}`);
const LEGEND_WEIGHTS = [0, 0.05, 0.25, 0.5, 1];

/** Return the place on the colour scale of a weight from 0 to 1. @param {number} weight */
export function weightFraction(weight) {
  return Math.sqrt(Math.min(Math.max(weight, 0), 1));
}

/**
 * Paint a lower triangle onto a canvas of `side` pixels, each with the largest weight it covers.
 * @param {HTMLCanvasElement} canvas
 * @param {number} size rows of the matrix
 * @param {(query: number, key: number) => number} weightAt
 * @param {number} [side]
 */
export function paintTriangle(canvas, size, weightAt, side = size) {
  const peaks = new Float32Array(side * side).fill(-1);
  for (let query = 0; query < size; query += 1) {
    const row = Math.floor((query * side) / size) * side;
    for (let key = 0; key <= query; key += 1) {
      const at = row + Math.floor((key * side) / size);
      const weight = weightAt(query, key);
      if (weight > peaks[at]) peaks[at] = weight;
    }
  }
  const table = sequentialTable();
  const image = new ImageData(side, side);
  peaks.forEach((weight, at) => {
    if (weight < 0) return;
    const color = Math.round(weightFraction(weight) * 255) * 3;
    image.data.set(table.subarray(color, color + 3), at * 4);
    image.data[at * 4 + 3] = 255;
  });
  canvas.width = side;
  canvas.height = side;
  contextOf(canvas).putImageData(image, 0, 0);
}

/**
 * Return the legend of a scale.
 * @param {{label: string, ticks: {at: number, text: string}[], stops?: string[]}} scale `stops` are
 *   the classes of its colours, of the sequential scale by default
 */
export function scaleLegend({ label, ticks, stops = SEQUENTIAL_STOPS }) {
  const id = uniqueId("scale");
  const colors = stops.map((name, index) =>
    s("stop", { offset: index / (stops.length - 1), class: name }),
  );
  return h("div", { class: "v-legend secondary small-text" }, [
    h("span", { class: "v-legend-label", text: label }),
    h("div", { class: "v-scale" }, [
      s("svg", { class: "v-scale-bar", "aria-hidden": "true", preserveAspectRatio: "none" }, [
        s("linearGradient", { id }, colors),
        s("rect", { width: "100%", height: "100%", rx: 3, fill: `url(#${id})` }),
      ]),
      h("div", { class: "v-scale-ticks" }, [
        ticks.map(({ at, text }) => h("span", { text, vars: { "--at": at } })),
      ]),
    ]),
  ]);
}

/** Return the legend of attention weights. */
export function weightLegend() {
  const ticks = LEGEND_WEIGHTS.map((weight) => ({ at: weightFraction(weight), text: `${weight}` }));
  return scaleLegend({ label: "attention weight", ticks });
}

/**
 * Return a heat map whose rows are queries and whose columns are keys.
 *
 * Pointer or arrow keys choose a cell; `onRead` receives it. A click or a key keeps its row, to
 * which the map returns when the pointer leaves.
 * @param {{onRead: (query: number, key: number, isKept: boolean) => void}} options
 */
export function heatMap({ onRead }) {
  const help = uniqueId("heat-map-help");
  const canvas = h("canvas", {
    class: "v-map-canvas",
    tabindex: 0,
    role: "application",
    "aria-roledescription": "heat map",
    "aria-label": "Attention weights",
    "aria-describedby": help,
  });
  const frame = h("div", { class: "v-map-frame" }, canvas);
  const element = h("div", { class: "v-map" }, [
    h("p", { class: "secondary small-text", text: "key: the token attended to →" }),
    frame,
    h("p", {
      class: "secondary small-text",
      id: help,
      text: "rows ↓ query: the token that attends. Arrow keys move.",
    }),
  ]);
  const image = document.createElement("canvas");
  /** @type {string[]} */
  let labels = [];
  /** @type {(query: number, key: number) => number} */
  let weightAt = () => 0;
  let kept = { query: 0, key: 0 };
  /** @type {{query: number, key: number} | null} */
  let hovered = null;
  let cell = MIN_CELL_PX;
  let margin = 0;
  const schedule = oncePerFrame(draw);

  function draw() {
    if (!labels.length || !frame.clientWidth) return;
    const context = contextOf(canvas);
    context.font = LABEL_FONT;
    const longest = Math.max(...labels.map((label) => context.measureText(label).width));
    margin = Math.ceil(Math.min(frame.clientWidth < 480 ? 64 : 104, longest + 10));
    const width = frame.clientWidth - FRAME_PADDING_PX - margin - 1;
    const room = Math.min(width, MAX_SIDE_PX) / labels.length;
    const fitting = room < WHOLE_CELL_PX ? room : Math.floor(room);
    cell = Math.min(Math.max(fitting, MIN_CELL_PX), MAX_CELL_PX);
    const side = margin + cell * labels.length + 1;
    resizeCanvas(canvas, side, side);
    context.imageSmoothingEnabled = false;
    context.drawImage(image, margin, margin, side - margin - 1, side - margin - 1);
    drawGrid(context);
    drawLabels(context);
    drawMarks(context);
  }

  /** @param {CanvasRenderingContext2D} context */
  function drawGrid(context) {
    if (cell < 10) return;
    context.strokeStyle = token("--surface");
    context.lineWidth = 1;
    context.beginPath();
    for (let index = 0; index <= labels.length; index += 1) {
      const at = margin + index * cell + 0.5;
      context.moveTo(margin, at);
      context.lineTo(margin + Math.min(index + 1, labels.length) * cell, at);
      context.moveTo(at, margin + Math.max(index - 1, 0) * cell);
      context.lineTo(at, margin + labels.length * cell);
    }
    context.stroke();
  }

  /** @param {CanvasRenderingContext2D} context */
  function drawLabels(context) {
    const every = Math.ceil(LABEL_STEP_PX / cell);
    const { query, key } = hovered ?? kept;
    context.font = LABEL_FONT;
    context.textAlign = "right";
    context.textBaseline = "middle";
    labels.forEach((label, index) => {
      const middle = margin + (index + 0.5) * cell;
      const text = shorten(context, label, margin - 8);
      /** @param {number} chosen */
      const near = (chosen) => index !== chosen && Math.abs(index - chosen) < every && every > 1;
      if ((index % every === 0 && !near(query)) || index === query) {
        context.fillStyle = token(index === query ? "--accent" : "--text-2");
        context.fillText(text, margin - 5, middle);
      }
      if ((index % every === 0 && !near(key)) || index === key) {
        context.save();
        context.translate(middle, margin - 5);
        context.rotate(Math.PI / 2);
        context.fillStyle = token(index === key ? "--accent" : "--text-2");
        context.fillText(text, 0, 0);
        context.restore();
      }
    });
  }

  /** @param {CanvasRenderingContext2D} context */
  function drawMarks(context) {
    const { query, key } = hovered ?? kept;
    context.lineWidth = 1.5;
    context.strokeStyle = token("--text");
    context.strokeRect(margin + 0.5, margin + query * cell + 0.5, (query + 1) * cell, cell);
    context.lineWidth = 2;
    context.strokeStyle = token("--accent");
    context.strokeRect(margin + key * cell + 0.5, margin + query * cell + 0.5, cell, cell);
  }

  /** @param {{query: number, key: number}} cellAt @param {boolean} isKept */
  function read(cellAt, isKept) {
    if (isKept) kept = cellAt;
    hovered = isKept ? null : cellAt;
    const { query, key } = hovered ?? kept;
    canvas.setAttribute("aria-label", describe(query, key));
    onRead(query, key, isKept);
    schedule();
  }

  /** Choose a row, and in it the key with the largest weight. @param {number} query */
  function selectQuery(query) {
    let key = 0;
    for (let other = 1; other <= query; other += 1) {
      if (weightAt(query, other) > weightAt(query, key)) key = other;
    }
    read({ query, key }, true);
  }

  /** @param {number} query @param {number} key */
  function describe(query, key) {
    const weight = weightAt(query, key).toFixed(4);
    return (
      `Attention weight of ${labels[query]}, position ${query}, on ${labels[key]}, ` +
      `position ${key}: ${weight}`
    );
  }

  /** @param {PointerEvent | MouseEvent} event */
  function cellOf(event) {
    const query = Math.floor((event.offsetY - margin) / cell);
    const key = Math.floor((event.offsetX - margin) / cell);
    const isInside = query >= 0 && query < labels.length && key >= 0 && key <= query;
    return isInside ? { query, key } : null;
  }

  canvas.addEventListener("pointermove", (event) => {
    const found = cellOf(event);
    if (found && (found.query !== hovered?.query || found.key !== hovered?.key)) read(found, false);
    if (!found && hovered) read(kept, true);
  });
  canvas.addEventListener("pointerleave", () => hovered && read(kept, true));
  canvas.addEventListener("click", (event) => {
    const found = cellOf(event);
    if (found) read(found, true);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = keyMove(event);
    if (!move) return;
    event.preventDefault();
    const [down, right] = move;
    const query = Math.min(Math.max(kept.query + down, 0), labels.length - 1);
    read({ query, key: Math.min(Math.max(kept.key + right, 0), query) }, true);
  });
  onThemeChange(canvas, () => {
    if (!labels.length) return;
    paintTriangle(image, labels.length, weightAt);
    schedule();
  });
  new ResizeObserver(schedule).observe(frame);

  return {
    element,
    /**
     * Show another matrix. The chosen row stays, or is the last one; its largest weight is read.
     * @param {Token[]} tokens
     * @param {(query: number, key: number) => number} weights
     */
    update(tokens, weights) {
      const query = tokens.length === labels.length ? kept.query : tokens.length - 1;
      labels = tokens.map(tokenLabel);
      weightAt = weights;
      paintTriangle(image, labels.length, weightAt);
      selectQuery(query);
    },
    selectQuery,
  };
}

/**
 * Return a text that is at most `width` pixels wide.
 * @param {CanvasRenderingContext2D} context
 * @param {string} text
 * @param {number} width
 */
function shorten(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 1 && context.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

/**
 * Return the prompt as text whose tokens can be shaded and chosen.
 * @param {Token[]} tokens
 * @param {{label: string, onSelect: (index: number) => void}} options
 */
export function tokenStrip(tokens, { label, onSelect }) {
  const items = tokens.map((token, index) =>
    h("button", {
      class: "bare v-token",
      tabindex: index ? -1 : 0,
      onclick: () => onSelect(index),
      text: tokenText(token),
    }),
  );
  const element = h("div", { class: "v-strip", role: "group", "aria-label": label }, items);
  rovingFocus(element, ".v-token");
  return {
    element,
    /**
     * Shade the tokens by fractions from 0 to 1.
     * @param {(index: number) => number} fractionOf
     * @param {(index: number) => string} describe
     * @param {number} current
     */
    shade(fractionOf, describe, current) {
      items.forEach((item, index) => {
        item.style.setProperty("--part", String(fractionOf(index)));
        item.title = describe(index);
        item.setAttribute("aria-pressed", String(index === current));
      });
    },
  };
}
