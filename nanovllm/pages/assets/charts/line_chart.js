/** A chart of lines with axes, a legend, and a read-out that follows the pointer or the keys. */

import { segmented } from "../elements/components.js";
import { h, keyMove, replace, s } from "../elements/dom.js";
import { shortNumber } from "../elements/format.js";
import { fitScale, fraction, tickLabels, ticks } from "./scales.js";

/** @import { Scale } from "./scales.js" */

export const MAX_MARKERS = 60;
const NUM_COLORS = 8;
const NUM_DASHES = 3;
const MARGIN = { left: 60, right: 20, top: 8, bottom: 24 };
const HEIGHTS = { large: 360, small: 220 };
const TICK_COUNT = 5;
const DOT_PX = 2.75;
const MARK_PX = 4.5;
const MAX_DISTANCE = 0.02; // of the x axis, from the cursor to a value that is read out

/**
 * A line: points [x, y] by rising x; a y of null leaves a gap.
 *
 * `color` is an index; after eight they repeat with another dash. A minor line is thin and pale.
 * `hasMarkers` draws the points as dots, if they are few; `hasLine` draws lines between them.
 * `mark` is a point to emphasize.
 * @typedef {{name: string, points: [number, number | null][], color: number, isMinor?: boolean,
 *   hasLine?: boolean, hasMarkers?: boolean, mark?: {x: number, y: number, label: string}}} Line
 * @typedef {{title: string, isWhole?: boolean, lines: Line[]}} Panel lines over one x axis, whose
 *   ticks are integers for counts
 */

/**
 * Return a chart. The same lines may be shown over several x axes, one at a time.
 *
 * The y axis begins at zero or may be logarithmic, see `fitScale`; `choice` is the title of the x
 * axis to begin with.
 * @param {{title: string, yTitle: string, panels: Panel[], note?: string, isLarge?: boolean,
 *   fromZero?: boolean, mayBeLog?: boolean, choice?: string | null,
 *   onchoose?: (title: string) => void}} options
 */
export function lineChart({ title, yTitle, note, isLarge, onchoose, ...options }) {
  const panels = options.panels
    .map((panel) => ({ ...panel, lines: panel.lines.filter(hasValues) }))
    .filter(({ lines }) => lines.length);
  const size = isLarge ? "large" : "small";
  const card = h("figure", { class: `card chart-card ${size}` });
  if (!panels.length) {
    card.append(h("h3", { text: title }), h("p", { class: "secondary", text: "No values yet." }));
    return card;
  }
  const values = panels.flatMap(({ lines }) => lines.flatMap(knownPoints)).map(([, y]) => y);
  const yScale = fitScale(values, options);
  const plot = h("div", { class: "plot", tabindex: 0, role: "group" });
  const xTitle = h("p", { class: "secondary small-text x-title" });
  let panel = panels.find((one) => one.title === options.choice) ?? panels[0];
  const area = () => project(panel, yScale, plot.clientWidth, HEIGHTS[size]);
  const show = () => {
    xTitle.textContent = panel.title;
    plot.setAttribute("aria-label", `${title} over ${panel.title}; arrow keys read the values`);
    if (plot.clientWidth) replace(plot, drawing(area(), describe(title, panel)));
  };
  new ResizeObserver(show).observe(plot);
  addReadOut(plot, area);
  const choices = panels.map((one) => ({ value: one.title, label: one.title }));
  /** @param {string} value */
  const choose = (value) => {
    panel = panels.find((one) => one.title === value) ?? panels[0];
    onchoose?.(value);
    show();
  };
  card.append(
    h("div", { class: "row between" }, [
      h("h3", { text: title }),
      panels.length > 1 &&
        segmented({ label: "x axis", options: choices, value: panel.title, onchange: choose }),
    ]),
    h("p", { class: "secondary small-text", text: yTitle + (yScale.isLog ? ", logarithmic" : "") }),
    plot,
    xTitle,
  );
  if (panels[0].lines.length > 1) card.append(legend(panels[0].lines));
  if (note) card.append(h("p", { class: "secondary small-text", text: note }));
  return card;
}

/** Return the piece of a line, or the dot, that stands for it in a legend. @param {Line} line */
export function lineKey(line) {
  const parts = [
    line.hasLine !== false && s("path", { d: "M1 5H25", class: "line" }),
    isDotted(line) && s("circle", { cx: 13, cy: 5, r: DOT_PX, class: "dot" }),
  ];
  const attributes = { width: 26, height: 10, "aria-hidden": "true" };
  return s("svg", { ...attributes, ...styleOf(line, "line-key") }, parts);
}

/** @param {Line[]} lines */
function legend(lines) {
  return h("ul", { class: "row legend line-legend" }, [
    lines.map((line) => h("li", {}, lineKey(line), line.name)),
  ]);
}

/** Return the class and the colour of a line. @param {Line} line */
function styleOf({ color, isMinor }, name = "") {
  const dash = Math.floor(color / NUM_COLORS) % NUM_DASHES;
  return {
    class: `${name} series dash-${dash}${isMinor ? " minor" : ""}`,
    vars: { "--series": `var(--cat-${color % NUM_COLORS})` },
  };
}

/** Return whether each point is a dot. @param {Line} line */
function isDotted({ points, hasLine = true, hasMarkers }) {
  return !hasLine || (hasMarkers && points.length <= MAX_MARKERS);
}

/** @param {Line} line @returns {[number, number][]} */
function knownPoints({ points }) {
  return /** @type {[number, number][]} */ (points.filter(([, y]) => y !== null));
}

/** @param {Line} line */
function hasValues(line) {
  return knownPoints(line).length > 0;
}

/** Return the scale of a panel's x axis, which begins at zero. @param {Panel} panel */
function xScaleOf({ lines }) {
  const xs = lines.flatMap(({ points }) => points.map(([x]) => x));
  const [low, high] = [Math.min(0, ...xs), Math.max(...xs)];
  return { low, high: high === low ? low + 1 : high, isLog: false };
}

/** @typedef {ReturnType<typeof project>} Area */

/**
 * Return functions from values to pixels.
 * @param {Panel} panel
 * @param {Scale} yScale
 * @param {number} width
 * @param {number} height
 */
function project(panel, yScale, width, height) {
  const xScale = xScaleOf(panel);
  const wide = Math.max(width - MARGIN.left - MARGIN.right, 1);
  const tall = height - MARGIN.top - MARGIN.bottom;
  /** @param {number} x */
  const xOf = (x) => MARGIN.left + fraction(xScale, x) * wide;
  /** @param {number} y */
  const yOf = (y) => MARGIN.top + (1 - fraction(yScale, y)) * tall;
  /** @param {number} pixels */
  const xAt = (pixels) => xScale.low + ((pixels - MARGIN.left) / wide) * (xScale.high - xScale.low);
  return { panel, xScale, yScale, width, height, xOf, yOf, xAt };
}

/** Return the drawing of a panel. @param {Area} area @param {string} label */
function drawing({ panel, xScale, yScale, width, height, xOf, yOf }, label) {
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const xTicks = ticks(xScale, TICK_COUNT, panel.isWhole ? 1 : 0);
  const yTicks = ticks(yScale, TICK_COUNT);
  const yLabels = tickLabels(yScale, yTicks);
  const xLabels = tickLabels(xScale, xTicks);
  const attributes = { class: "chart", width, height, role: "img", "aria-label": label };
  const axes = [
    yTicks.map((tick, index) => [
      s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: yOf(tick), y2: yOf(tick) }),
      s("text", { x: MARGIN.left - 8, y: yOf(tick) + 4, "text-anchor": "end" }, yLabels[index]),
    ]),
    xTicks.map((tick, index) =>
      s("text", { x: xOf(tick), y: bottom + 18, "text-anchor": "middle" }, xLabels[index]),
    ),
    s("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
  ];
  const drawn = panel.lines.map((line) => drawLine(line, xOf, yOf));
  return s("svg", attributes, axes, drawn);
}

/**
 * Draw a line; points without neighbours and the marked point are dots.
 * @param {Line} line
 * @param {(x: number) => number} xOf
 * @param {(y: number) => number} yOf
 */
function drawLine(line, xOf, yOf) {
  /** @type {[number, number][][]} */
  const pieces = [[]];
  for (const [x, y] of line.points) {
    if (y === null) pieces.push([]);
    else pieces[pieces.length - 1].push([xOf(x), yOf(y)]);
  }
  const outline = pieces
    .filter((piece) => piece.length > 1)
    .map((piece) => `M${piece.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`);
  const dots = pieces.filter((piece) => isDotted(line) || piece.length === 1).flat();
  /** @param {[number, number]} point @param {number} r @param {any[]} children */
  const dot = ([x, y], r, ...children) =>
    s("circle", { class: "dot", cx: x.toFixed(1), cy: y.toFixed(1), r }, children);
  const { mark } = line;
  return s("g", styleOf(line), [
    line.hasLine !== false && s("path", { class: "line", d: outline.join("") }),
    dots.map((point) => dot(point, DOT_PX)),
    mark && dot([xOf(mark.x), yOf(mark.y)], MARK_PX, s("title", {}, mark.label)),
  ]);
}

/** Return a panel in words, for screen readers. @param {string} title @param {Panel} panel */
function describe(title, panel) {
  const lines = panel.lines.slice(0, NUM_COLORS).map((line) => {
    const known = knownPoints(line);
    /** @param {[number, number]} point */
    const read = ([x, y]) => `${shortNumber(y)} at ${shortNumber(x)}`;
    return `${line.name}: ${read(known[0])}, ${read(known[known.length - 1])}`;
  });
  return `${title} over ${panel.title}. ${lines.join("; ")}.`;
}

/**
 * Show the values of all lines at the pointer, or at a step that the arrow keys choose.
 * @param {HTMLElement} plot
 * @param {() => Area} areaOf
 */
function addReadOut(plot, areaOf) {
  let current = 0;

  function hide() {
    for (const part of plot.querySelectorAll(".cursor, .read-dot, .read-out")) part.remove();
  }

  /** @param {number} target */
  function show(target) {
    hide();
    const { panel, xScale, xOf, yOf } = areaOf();
    const found = panel.lines.map((line) => ({ line, point: nearest(knownPoints(line), target) }));
    [current] = nearest([...found.map(({ point }) => point)], target);
    // A line that has ended, or has not begun, has no value here.
    const shown = found.filter(
      ({ point: [x] }) => Math.abs(x - current) <= MAX_DISTANCE * (xScale.high - xScale.low),
    );
    const rows = shown.map(({ line, point: [x, y] }) => [
      h("span", {}, lineKey(line), line.name),
      h("b", { text: shortNumber(y) + (x === current ? "" : ` at ${shortNumber(x)}`) }),
    ]);
    const head = h("p", { text: `${panel.title} ${shortNumber(current)}` });
    const box = h("div", { class: "read-out", role: "status" }, head, rows);
    const dots = shown.map(({ line, point: [x, y] }) =>
      h("i", { ...styleOf(line, "read-dot"), ...at(line, xOf(x), yOf(y)) }),
    );
    plot.append(h("i", { class: "cursor", vars: { "--x": `${xOf(current)}px` } }), ...dots, box);
    const left = xOf(current) + 12;
    const fits = left + box.offsetWidth <= plot.clientWidth;
    const start = fits ? left : Math.max(0, xOf(current) - 12 - box.offsetWidth);
    box.style.setProperty("--x", `${start}px`);
  }

  /** @param {Line} line @param {number} x @param {number} y */
  function at(line, x, y) {
    return { vars: { ...styleOf(line).vars, "--x": `${x}px`, "--y": `${y}px` } };
  }

  /** @param {PointerEvent} event */
  function follow(event) {
    show(areaOf().xAt(event.clientX - plot.getBoundingClientRect().left));
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("focus", () => {
    if (plot.matches(":focus-visible")) show(areaOf().xScale.high);
  });
  plot.addEventListener("keydown", (event) => {
    const step = keyMove(event)?.[1];
    if (!step) return;
    event.preventDefault();
    const points = areaOf().panel.lines.flatMap(knownPoints);
    const [from] = nearest(points, current);
    const others = points.filter(([x]) => (x - from) * step > 0);
    show(others.length ? nearest(others, from)[0] : from);
  });
}

/** Return the point with the nearest x. @param {number[][]} points @param {number} target */
function nearest(points, target) {
  return points.reduce((best, point) =>
    Math.abs(point[0] - target) < Math.abs(best[0] - target) ? point : best,
  );
}
