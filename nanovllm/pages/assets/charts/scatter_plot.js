/** A scatter plot of tokens on a canvas, with zoom, panning, labels and a legend. */

import { button } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { formatThings, tokenLabel } from "../elements/format.js";
import { oncePerFrame, resizeCanvas } from "./canvas.js";
import { categoricalColor, onThemeChange, token } from "./colors.js";
import { placeLabels } from "./labels.js";
import { robustRange } from "./robust_range.js";

/** @import { Token } from "../elements/format.js" */

const POINT_PX = 2.5;
const MARGIN_PX = 24;
const HIT_PX = 10;
const MAX_ZOOM = 60;
const MAX_LABELS = 160;
const LABEL_FONT_OF_POINTS = "12px ui-monospace, Menlo, Consolas, monospace";

/**
 * A token; a point that lies far out is drawn at the edge, as a ring.
 * @typedef {Token & {x: number, y: number, kind: number, isOutside: boolean}} Point
 */

/**
 * Kinds of token; the first that matches counts.
 * @type {{name: string, matches: (token: Token) => boolean}[]}
 */
const TOKEN_KINDS = [
  { name: "starts a word", matches: ({ text }) => /^\s\p{Ll}/u.test(text) },
  { name: "starts a capitalized word", matches: ({ text }) => /^\s?\p{Lu}/u.test(text) },
  { name: "inside a word", matches: ({ text }) => /^\p{L}/u.test(text) },
  { name: "number", matches: ({ text }) => /^\s?\p{N}/u.test(text) },
  {
    name: "bytes and control characters",
    matches: ({ text, bytes }) => Boolean(bytes) || /^\p{C}/u.test(text),
  },
  { name: "punctuation and other", matches: () => true },
];

/**
 * Return a scatter plot that can be zoomed, moved and read with pointer or keys.
 * @param {{onSelect: (point: Point) => void}} options
 */
export function scatterPlot({ onSelect }) {
  const canvas = h("canvas", {
    class: "v-scatter-canvas",
    tabindex: 0,
    role: "application",
    "aria-roledescription": "scatter plot",
    "aria-label":
      "Token embeddings. Arrow keys move, plus and minus zoom, 0 shows all. " +
      "Search lists tokens as text.",
  });
  const frame = h("div", { class: "v-scatter" }, canvas);
  const reading = h("p", { class: "v-reading", text: "Point at a token to read it." });
  const yAxis = h("p", { class: "secondary small-text" });
  const xAxis = h("p", { class: "secondary small-text v-axis-x" });
  const hidden = new Set();
  const outside = h("p", { class: "secondary small-text", hidden: true });
  /** @type {Point[]} */
  let points = [];
  let scale = { x: 0, y: 0, width: 1, height: 1 }; // centre and size of the data
  let view = { zoom: 1, x: 0, y: 0 };
  let highlighted = new Set();
  let linked = new Set();
  /** @type {number | null} */
  let selectedId = null;
  /** @type {Point | null} */
  let hovered = null;
  const schedule = oncePerFrame(draw);

  const width = () => frame.clientWidth;
  const height = () => frame.clientHeight;
  const unit = () =>
    view.zoom *
    Math.min((width() - 2 * MARGIN_PX) / scale.width, (height() - 2 * MARGIN_PX) / scale.height);
  /** @param {number} x */
  const screenX = (x) => width() / 2 + (x - scale.x) * unit() + view.x;
  /** @param {number} y */
  const screenY = (y) => height() / 2 - (y - scale.y) * unit() + view.y;

  function draw() {
    if (!width() || !points.length) return;
    const context = resizeCanvas(canvas, width(), height());
    const colors = TOKEN_KINDS.map((_, kind) => categoricalColor(kind));
    const isFiltered = highlighted.size > 0;
    const shown = points.filter(isVisible);
    for (const isFront of isFiltered ? [false, true] : [true]) {
      context.globalAlpha = isFront ? 0.85 : 0.15;
      for (const point of shown) {
        if (isFiltered && highlighted.has(point.id) !== isFront) continue;
        dot(context, point, isFiltered && isFront ? POINT_PX + 1.5 : POINT_PX, colors[point.kind]);
      }
    }
    context.globalAlpha = 1;
    drawLinks(context, colors);
    drawTexts(context, shown);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Point} point
   * @param {number} radius
   * @param {string} color
   */
  function dot(context, point, radius, color) {
    context.fillStyle = context.strokeStyle = color;
    context.beginPath();
    context.arc(screenX(point.x), screenY(point.y), radius, 0, 2 * Math.PI);
    if (point.isOutside) context.stroke();
    else context.fill();
  }

  /** @param {CanvasRenderingContext2D} context @param {string[]} colors */
  function drawLinks(context, colors) {
    const selected = points.find(({ id }) => id === selectedId);
    if (!selected) return;
    context.lineWidth = 1;
    for (const point of points.filter(({ id }) => linked.has(id))) {
      context.globalAlpha = 0.5;
      context.strokeStyle = token("--accent");
      context.beginPath();
      context.moveTo(screenX(selected.x), screenY(selected.y));
      context.lineTo(screenX(point.x), screenY(point.y));
      context.stroke();
      context.globalAlpha = 1;
      dot(context, point, POINT_PX + 1.5, colors[point.kind]);
    }
    dot(context, selected, POINT_PX + 3, token("--accent"));
  }

  /**
   * Write labels where there is room: of the tokens that stand out first, then of others.
   * @param {CanvasRenderingContext2D} context
   * @param {Point[]} shown
   */
  function drawTexts(context, shown) {
    /** @param {Point} point */
    const rankOf = ({ id }) =>
      [id === hovered?.id, id === selectedId, linked.has(id), highlighted.has(id)].indexOf(true);
    const special = shown.filter((point) => rankOf(point) >= 0);
    special.sort((a, b) => rankOf(a) - rankOf(b));
    const others = highlighted.size ? [] : shown.filter((point) => rankOf(point) < 0);
    const candidates = [...special, ...others]
      .map((point, index) => ({
        point,
        x: screenX(point.x),
        y: screenY(point.y),
        isMarked: index < special.length,
        isRequired: point === hovered,
      }))
      .filter(({ x, y }) => x >= 0 && x <= width() && y >= 0 && y <= height());
    context.font = LABEL_FONT_OF_POINTS;
    context.lineWidth = 3;
    context.lineJoin = "round";
    context.strokeStyle = token("--surface");
    const [strong, weak] = [token("--text"), token("--text-2")];
    const labels = placeLabels(candidates, {
      width: width(),
      height: height(),
      most: MAX_LABELS,
      widthOf: ({ point }) => context.measureText(tokenLabel(point)).width,
      obstacles: [boxOf(zoomButtons)],
    });
    for (const { candidate, x, y } of labels) {
      const label = tokenLabel(candidate.point);
      context.fillStyle = candidate.isMarked ? strong : weak;
      context.strokeText(label, x, y);
      context.fillText(label, x, y);
    }
  }

  /** @param {Point} point */
  function isVisible(point) {
    const [x, y] = [screenX(point.x), screenY(point.y)];
    return !hidden.has(point.kind) && x > -20 && x < width() + 20 && y > -20 && y < height() + 20;
  }

  /** @param {number} x @param {number} y */
  function nearest(x, y) {
    let best = null;
    let distance = HIT_PX ** 2;
    for (const point of points) {
      if (hidden.has(point.kind)) continue;
      const apart = (screenX(point.x) - x) ** 2 + (screenY(point.y) - y) ** 2;
      if (apart < distance) [best, distance] = [point, apart];
    }
    return best;
  }

  /** @param {number} factor @param {number} [x] @param {number} [y] */
  function zoomBy(factor, x = width() / 2, y = height() / 2) {
    const zoom = Math.min(Math.max(view.zoom * factor, 1), MAX_ZOOM);
    const change = zoom / view.zoom;
    const [fromX, fromY] = [x - width() / 2, y - height() / 2];
    view = { zoom, x: fromX - (fromX - view.x) * change, y: fromY - (fromY - view.y) * change };
    if (zoom === 1) view = { zoom: 1, x: 0, y: 0 };
    schedule();
  }

  /** @param {number} x @param {number} y */
  function moveBy(x, y) {
    view = { ...view, x: view.x + x, y: view.y + y };
    schedule();
  }

  listenToPointers(canvas, {
    zoomBy,
    moveBy,
    /** @param {number} x @param {number} y */
    hover(x, y) {
      hovered = nearest(x, y);
      canvas.classList.toggle("v-pointing", Boolean(hovered));
      reading.textContent = hovered
        ? `${tokenLabel(hovered)}: token id ${hovered.id}, ${TOKEN_KINDS[hovered.kind].name}` +
          (hovered.isOutside ? ", further out than drawn" : "")
        : "Point at a token to read it.";
      schedule();
    },
    /** @param {number} x @param {number} y */
    click(x, y) {
      const point = nearest(x, y);
      if (point) onSelect(point);
    },
  });
  canvas.addEventListener("keydown", (event) => {
    /** @type {Record<string, () => void>} */
    const actions = {
      "+": () => zoomBy(1.4),
      "=": () => zoomBy(1.4),
      "-": () => zoomBy(1 / 1.4),
      0: () => zoomBy(0),
      ArrowLeft: () => moveBy(40, 0),
      ArrowRight: () => moveBy(-40, 0),
      ArrowUp: () => moveBy(0, 40),
      ArrowDown: () => moveBy(0, -40),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  });
  onThemeChange(canvas, schedule);
  new ResizeObserver(schedule).observe(frame);

  const legend = h("div", { class: "row legend", role: "group", "aria-label": "Kinds of token" }, [
    TOKEN_KINDS.map(({ name }, kind) =>
      h("label", { class: "checkbox" }, [
        h("input", {
          type: "checkbox",
          checked: true,
          onchange: (/** @type {any} */ event) => {
            if (event.target.checked) hidden.delete(kind);
            else hidden.add(kind);
            schedule();
          },
        }),
        h("span", { class: "swatch v-swatch", vars: { "--swatch": `var(--cat-${kind})` } }),
        name,
      ]),
    ),
  ]);
  const zoomButtons = h("div", { class: "row v-zoom" }, [
    button("Zoom in", { icon: "plus", iconOnly: true, small: true }, () => zoomBy(1.6)),
    button("−", { small: true, "aria-label": "Zoom out" }, () => zoomBy(1 / 1.6)),
    button("Show all", { icon: "reset", small: true }, () => zoomBy(0)),
  ]);
  return {
    element: h("div", { class: "stack tight" }, [
      legend,
      yAxis,
      h("div", { class: "v-scatter-wrap" }, frame, zoomButtons),
      xAxis,
      outside,
      reading,
    ]),
    /** @param {(Token & {x: number, y: number})[]} newPoints @param {string[]} axisNames */
    update(newPoints, [xName, yName]) {
      const [xs, ys] = [
        robustRange(newPoints.map(({ x }) => x)),
        robustRange(newPoints.map(({ y }) => y)),
      ];
      points = newPoints.map((point) => {
        const [x, y] = [inside(point.x, xs), inside(point.y, ys)];
        return { ...point, x, y, isOutside: x !== point.x || y !== point.y, kind: kindOf(point) };
      });
      const numOutside = points.filter(({ isOutside }) => isOutside).length;
      outside.textContent = `${formatThings(numOutside, "token")} outside the picture: rings at its edge.`;
      outside.hidden = !numOutside;
      scale = {
        x: (xs[0] + xs[1]) / 2,
        y: (ys[0] + ys[1]) / 2,
        width: xs[1] - xs[0] || 1,
        height: ys[1] - ys[0] || 1,
      };
      yAxis.textContent = `↑ ${yName}`;
      xAxis.textContent = `${xName} →`;
      schedule();
    },
    /** @param {number} id */
    select(id) {
      selectedId = id;
      linked = new Set();
      schedule();
    },
    /** @param {number[]} ids */
    link(ids) {
      linked = new Set(ids);
      schedule();
    },
    /** @param {number[]} ids */
    highlight(ids) {
      highlighted = new Set(ids);
      schedule();
    },
  };
}

/**
 * Turn pointer events into zooming, moving, hovering and clicking; two pointers pinch.
 * @param {HTMLCanvasElement} canvas
 * @param {Record<"zoomBy" | "moveBy" | "hover" | "click", (...numbers: number[]) => void>} actions
 */
function listenToPointers(canvas, { zoomBy, moveBy, hover, click }) {
  /** @type {Map<number, {x: number, y: number}>} */
  const down = new Map();
  let moved = 0;
  /** @param {PointerEvent} event */
  const at = (event) => ({ x: event.offsetX, y: event.offsetY });
  const spread = () => {
    const [a, b] = [...down.values()];
    return Math.hypot(a.x - b.x, a.y - b.y) || 1;
  };
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY * 0.002), event.offsetX, event.offsetY);
    },
    { passive: false },
  );
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, at(event));
    if (down.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    const now = at(event);
    if (!before) return hover(now.x, now.y);
    const wide = down.size === 2 ? spread() : 0;
    down.set(event.pointerId, now);
    moved += Math.hypot(now.x - before.x, now.y - before.y);
    if (down.size === 2) zoomBy(spread() / wide, now.x, now.y);
    else moveBy(now.x - before.x, now.y - before.y);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (down.delete(event.pointerId) && moved < 4) click(event.offsetX, event.offsetY);
  });
  canvas.addEventListener("pointercancel", (event) => down.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => hover(-100, -100));
}

/** Return the nearest value of a range. @param {number} value @param {[number, number]} range */
function inside(value, [low, high]) {
  return Math.min(Math.max(value, low), high);
}

/** Return where an element stands in its parent. @param {HTMLElement} element */
function boxOf({ offsetLeft: left, offsetTop: top, offsetWidth, offsetHeight }) {
  return { left, top, right: left + offsetWidth, bottom: top + offsetHeight };
}

/** @param {Token} point */
function kindOf(point) {
  return TOKEN_KINDS.findIndex(({ matches }) => matches(point));
}
