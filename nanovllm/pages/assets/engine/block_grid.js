/** The pool of KV cache blocks as a grid on a canvas, a cell a block. */

import { resizeCanvas } from "../charts/canvas.js";
import { categoricalColor, token } from "../charts/colors.js";
import { h, keyMove, replace } from "../elements/dom.js";
import { formatCount } from "../elements/format.js";

/** @import { Names, Request, State } from "./replay.js" */

const MIN_CELL = 5;
const MAX_CELL = 18;
const FREE = 0;
const CACHED = 1;
const FIRST_OWNER = 2;

/**
 * Return the grid. `onSelect` receives the request that owns the chosen block, or null.
 * @param {{names: Names,
 *   onSelect: (id: string | null) => void}} options
 */
export function blockGrid({ names, onSelect }) {
  const canvas = h("canvas", {
    class: "v-blocks-canvas",
    tabindex: 0,
    role: "application",
    "aria-roledescription": "grid of blocks",
  });
  const frame = h("div", { class: "v-blocks" }, canvas);
  const reading = h("p", { class: "v-reading small-text" });
  const legend = h("div", { class: "row legend" });
  /** @type {any} null before the first state */
  let state = null;
  let cells = new Int32Array(0);
  /** @type {string | null} */
  let selected = null;
  /** @type {number | null} */
  let current = null;
  let layout = { columns: 1, cell: MAX_CELL };

  function read() {
    if (current === null || current >= cells.length) {
      reading.textContent = "Point at a block to see who holds it.";
      return;
    }
    const per = state.blocks.blocks_per_cell;
    const first = current * per;
    const block = per === 1 ? `Block ${first}` : `Blocks ${first} to ${first + per - 1}`;
    reading.textContent = `${block}: ${describe(cells[current])}`;
    canvas.setAttribute("aria-label", `KV cache blocks. ${reading.textContent}`);
  }

  /** @param {number} value */
  function ownerOf(value) {
    return value >= FIRST_OWNER ? (state.requests[value - FIRST_OWNER] ?? null) : null;
  }

  /** @param {number} value */
  function describe(value) {
    if (value === FREE) return "free";
    if (value === CACHED)
      return "cached: no request holds it, and a prompt with the same prefix can use it";
    if (value < 0) return `shared by ${-value} requests with the same prefix`;
    const owner = ownerOf(value);
    return owner ? `held by request ${names.name(owner.id, owner.choice)}` : "held by a request";
  }

  function draw() {
    const width = frame.clientWidth;
    if (!state || !width) return;
    const fit = Math.floor(Math.sqrt((width * 220) / Math.max(cells.length, 1)));
    const cell = Math.min(Math.max(fit, MIN_CELL), MAX_CELL);
    const columns = Math.max(Math.floor(width / cell), 1);
    layout = { columns, cell };
    const rows = Math.ceil(cells.length / columns);
    const context = resizeCanvas(canvas, columns * cell, rows * cell);
    const colors = {
      free: token("--cell-free"),
      cached: token("--cell-cached"),
      shared: token("--text"),
      owners: Array.from({ length: 8 }, (_, index) => categoricalColor(index)),
    };
    const size = cell - (cell > 8 ? 2 : 1);
    cells.forEach((value, index) => {
      const owner = ownerOf(value);
      const x = (index % columns) * cell;
      const y = Math.floor(index / columns) * cell;
      context.globalAlpha = selected && owner?.id !== selected ? 0.25 : 1;
      context.fillStyle = colorOf(value, owner, colors);
      context.fillRect(x, y, size, size);
      if (index === current) {
        context.globalAlpha = 1;
        context.lineWidth = 2;
        context.strokeStyle = token("--accent");
        context.strokeRect(x, y, size, size);
      }
    });
    context.globalAlpha = 1;
  }

  /**
   * @param {number} value
   * @param {Request | null} owner
   * @param {{free: string, cached: string, shared: string, owners: string[]}} colors
   */
  function colorOf(value, owner, colors) {
    if (value === FREE) return colors.free;
    if (value === CACHED) return colors.cached;
    if (value < 0) return colors.shared;
    return owner ? colors.owners[names.color(owner.id)] : colors.cached;
  }

  /** @param {PointerEvent | MouseEvent} event */
  function at(event) {
    const column = Math.floor(event.offsetX / layout.cell);
    const index = Math.floor(event.offsetY / layout.cell) * layout.columns + column;
    return column < layout.columns && index >= 0 && index < cells.length ? index : null;
  }

  /** @param {number | null} index */
  function point(index) {
    if (index === current) return;
    current = index;
    read();
    draw();
  }

  canvas.addEventListener("pointermove", (event) => point(at(event)));
  canvas.addEventListener("pointerleave", () => point(null));
  /** @param {number | null} index of a block */
  function selectOwner(index) {
    onSelect(index === null ? null : (ownerOf(cells[index])?.id ?? null));
  }

  canvas.addEventListener("click", (event) => selectOwner(at(event)));
  canvas.addEventListener("keydown", (event) => {
    const move = keyMove(event);
    if (event.key === "Enter") selectOwner(current);
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const next = (current ?? 0) + move[0] * layout.columns + move[1];
    point(Math.min(Math.max(next, 0), cells.length - 1));
  });
  new ResizeObserver(draw).observe(frame);

  return {
    element: h("div", { class: "stack tight" }, legend, frame, reading),
    draw,
    /** Show the blocks of a state. @param {State} newState */
    update(newState) {
      state = newState;
      const { blocks } = state;
      cells = unpackRuns(blocks.cells);
      replace(
        legend,
        legendItem("v-swatch-owned", "held by one request", blocks.used - blocks.shared),
        legendItem("v-swatch-shared", "shared", blocks.shared),
        legendItem("v-swatch-cached", "cached (can be reused)", blocks.cached),
        legendItem("v-swatch-free", "free", blocks.free),
        blocks.blocks_per_cell > 1 &&
          h("span", { text: `A cell is ${blocks.blocks_per_cell} blocks.` }),
      );
      canvas.setAttribute(
        "aria-label",
        `KV cache blocks: ${blocks.used} used, ${blocks.shared} of them shared, ` +
          `${blocks.cached} cached, ${blocks.free} free, ${blocks.total} in all. Arrow keys move.`,
      );
      read();
      draw();
    },
    /** Bring out the blocks of a request. @param {string | null} id */
    select(id) {
      selected = id;
      draw();
    },
  };
}

/** @param {string} swatch @param {string} name @param {number} count */
function legendItem(swatch, name, count) {
  return h("span", {}, [
    h("span", { class: `swatch ${swatch}` }),
    `${name} `,
    h("strong", { text: formatCount(count) }),
  ]);
}

/** Return the cells of [value, length] runs. @param {[number, number][]} runs */
function unpackRuns(runs) {
  const cells = new Int32Array(runs.reduce((total, [, length]) => total + length, 0));
  let start = 0;
  for (const [value, length] of runs) {
    cells.fill(value, start, start + length);
    start += length;
  }
  return cells;
}
