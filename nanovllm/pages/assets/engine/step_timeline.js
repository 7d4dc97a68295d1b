/**
 * Steps as columns and sequences as rows: what each step computed for whom.
 *
 * A step that verifies drafted tokens gives a sequence several tokens. Its bar is filled as far as
 * the tokens that it gave, and only outlined for the drafted tokens that were rejected.
 */

import { resizeCanvas } from "../charts/canvas.js";
import { categoricalColor, token } from "../charts/colors.js";
import { h, replace } from "../elements/dom.js";
import { formatCount, formatDuration, formatThings } from "../elements/format.js";

/** @import { Names, Sequence, StepRecord } from "./replay.js" */

const COLUMN_PX = 14;
const ROW_PX = 13;
const MAX_ROWS = 24;
const LABEL_PX = 48;
const TOTAL_PX = 56;
const AXIS_PX = 22;
const FONT = "11px system-ui, sans-serif";
const NO_STEPS_TEXT =
  "No step has been recorded yet. Steps are recorded only while this page is open.";
const DRAFTS_TEXT =
  "The step verified drafted tokens. Each accepted one is a token without a step of its own.";
/** @type {Record<string, string>} */
const KIND_TEXTS = {
  prefill: "prefill of the rest of the prompt",
  chunk: "chunk of the prompt",
  decode: "decode",
  fork: "fork of another choice",
};

/**
 * Return the timeline. `onWatch` receives the number of the chosen step, `onSelect` a request.
 * @param {{names: Names,
 *   onWatch: (step: number) => void, onSelect: (id: string) => void}} options
 */
export function stepTimeline({ names, onWatch, onSelect }) {
  const label = "No steps yet"; // until the first ones are drawn
  const canvas = h("canvas", { class: "v-timeline-canvas", role: "img", "aria-label": label });
  const frame = h("div", { class: "v-timeline" }, canvas);
  const budgetText = h("span", {});
  const draftsKey = h("span", { hidden: true }, [
    h("span", { class: "v-key v-key-rejected" }),
    "rejected drafts",
  ]);
  const legend = timelineLegend(draftsKey, budgetText);
  const omitted = h("p", { class: "secondary small-text", hidden: true });
  const details = h("div", { class: "v-step" });
  /** @type {StepRecord[]} */
  let records = [];
  /** @type {{name: string, id: string, choice: number}[]} */
  let rows = [];
  /** @type {number | null} */
  let watched = null;
  /** @type {string | null} */
  let selected = null;
  /** @type {number | null} */
  let hovered = null;
  let budget = 1;
  let peak = 1;

  function visible() {
    const count = Math.max(Math.floor((frame.clientWidth - LABEL_PX) / COLUMN_PX), 1);
    const last =
      watched === null ? records.length : records.findIndex(({ step }) => step === watched) + 1;
    const end = Math.min(records.length, Math.max(last + Math.floor(count / 3), count));
    return records.slice(Math.max(end - count, 0), end);
  }

  function draw() {
    const width = frame.clientWidth;
    if (!width) return;
    const shown = visible();
    const seen = new Map();
    for (const { sequences } of shown) {
      for (const { id, choice } of sequences) seen.set(names.name(id, choice), { id, choice });
    }
    const all = [...seen].map(([name, of]) => ({ name, ...of }));
    rows = all.slice(-MAX_ROWS);
    const numOmitted = all.length - rows.length;
    omitted.textContent = `Not shown: ${formatThings(numOmitted, "earlier sequence")}.`;
    omitted.hidden = !numOmitted;
    const height = TOTAL_PX + AXIS_PX + Math.max(rows.length, 4) * ROW_PX + 4;
    const context = resizeCanvas(canvas, width, height);
    const palette = readPalette();
    context.font = FONT;
    context.textBaseline = "middle";
    peak = Math.min(Math.max(...shown.map(({ num_tokens: tokens }) => tokens), 8), budget);
    const drawing = { context, shown, palette };
    drawTotals(drawing);
    drawRows(drawing);
    drawGaps(drawing);
  }

  /** @param {Drawing} drawing */
  function drawTotals({ context, shown, palette }) {
    context.fillStyle = palette.text;
    context.textAlign = "right";
    context.fillText(formatCount(peak), LABEL_PX - 6, 8);
    context.fillText("0", LABEL_PX - 6, TOTAL_PX - 2);
    context.strokeStyle = palette.grid;
    line(context, LABEL_PX, 4.5, frame.clientWidth, 4.5);
    line(context, LABEL_PX, TOTAL_PX + 0.5, frame.clientWidth, TOTAL_PX + 0.5);
    shown.forEach((record, column) => {
      const x = LABEL_PX + column * COLUMN_PX;
      if (record.step === watched || record.step === hovered) {
        context.fillStyle = palette.soft;
        context.fillRect(x, 0, COLUMN_PX, canvas.height);
      }
      const full = TOTAL_PX - 5;
      const prompt = (record.num_prompt_tokens / peak) * full;
      const decode = (record.num_decode_tokens / peak) * full;
      context.fillStyle = palette.prompt;
      context.fillRect(x + 2, TOTAL_PX - prompt, COLUMN_PX - 4, prompt);
      context.fillStyle = palette.decode;
      const least = record.num_decode_tokens ? Math.max(decode, 1) : 0;
      context.fillRect(x + 2, TOTAL_PX - prompt - least, COLUMN_PX - 4, least);
      const [, rejected] = draftsOf(record.sequences);
      const wasted = (rejected / peak) * full;
      context.strokeStyle = palette.decode;
      if (wasted > 1)
        context.strokeRect(x + 2.5, TOTAL_PX - prompt - least - wasted, COLUMN_PX - 5, wasted);
      context.strokeStyle = palette.grid;
      if (record.step % 10 === 0) {
        context.fillStyle = palette.text;
        context.textAlign = "center";
        context.fillText(formatCount(record.step), x + COLUMN_PX / 2, TOTAL_PX + 11);
      }
    });
  }

  /** Mark where steps are missing between two columns. @param {Drawing} drawing */
  function drawGaps({ context, shown, palette }) {
    context.strokeStyle = palette.text;
    context.setLineDash([2, 3]);
    shown.forEach(({ step }, column) => {
      const x = LABEL_PX + column * COLUMN_PX + 0.5;
      if (column && step !== shown[column - 1].step + 1) line(context, x, 0, x, canvas.height);
    });
    context.setLineDash([]);
  }

  /** @param {Drawing} drawing */
  function drawRows({ context, shown, palette }) {
    const top = TOTAL_PX + AXIS_PX;
    const rowOf = new Map(rows.map(({ name }, index) => [name, index]));
    rows.forEach(({ name, id }, index) => {
      const y = top + index * ROW_PX;
      context.globalAlpha = selected && selected !== id ? 0.35 : 1;
      context.fillStyle = id === selected ? palette.strong : palette.text;
      context.textAlign = "right";
      context.fillText(name, LABEL_PX - 6, y + ROW_PX / 2);
      context.globalAlpha = 1;
      context.strokeStyle = palette.grid;
      line(context, LABEL_PX, y + ROW_PX - 0.5, frame.clientWidth, y + ROW_PX - 0.5);
    });
    shown.forEach((record, column) => {
      const x = LABEL_PX + column * COLUMN_PX;
      for (const sequence of record.sequences) {
        const row = rowOf.get(names.name(sequence.id, sequence.choice));
        if (row === undefined) continue;
        context.globalAlpha = selected && selected !== sequence.id ? 0.25 : 1;
        mark(context, sequence, x, top + row * ROW_PX, palette.owners[names.color(sequence.id)]);
        context.globalAlpha = 1;
      }
      const endMarks = [
        { ended: record.preempted, sign: "×", color: palette.danger },
        { ended: record.finished, sign: "▪", color: palette.strong },
      ];
      for (const { ended, sign, color } of endMarks) {
        for (const { id } of ended) {
          const row = rows.findIndex((one) => one.id === id);
          if (row < 0) continue;
          context.fillStyle = color;
          context.textAlign = "center";
          context.font = sign === "×" ? "bold 15px system-ui, sans-serif" : FONT;
          context.fillText(sign, x + COLUMN_PX / 2, top + row * ROW_PX + ROW_PX / 2);
          context.font = FONT;
        }
      }
    });
  }

  /**
   * Draw prefill as a full cell, a chunk as a cell with a notch, and decode as a small bar, whose
   * outlined end are the drafted tokens that were rejected.
   * @param {CanvasRenderingContext2D} context
   * @param {Sequence} sequence
   * @param {number} x
   * @param {number} y
   * @param {string} color
   */
  function mark(context, { kind, count, drafted = 0, accepted = 0 }, x, y, color) {
    context.fillStyle = context.strokeStyle = color;
    if (kind === "decode") {
      const full = COLUMN_PX - 4;
      const filled = full * (1 - (drafted - accepted) / count);
      context.fillRect(x + 2, y + 4, filled, ROW_PX - 8);
      if (filled < full) context.strokeRect(x + 2.5, y + 4.5, full - 1, ROW_PX - 9);
    } else if (kind === "fork") context.fillRect(x + COLUMN_PX / 2 - 1, y + 1, 2, ROW_PX - 3);
    else
      context.fillRect(x + 1, y + 1, kind === "chunk" ? COLUMN_PX - 1 : COLUMN_PX - 4, ROW_PX - 3);
  }

  /** @param {StepRecord | null} record */
  function showDetails(record) {
    if (!record) {
      replace(details, h("p", { class: "secondary", text: NO_STEPS_TEXT }));
      return;
    }
    const list = record.sequences.map(({ id, choice, start, count, kind, drafted, accepted }) =>
      h("li", { class: "pill" }, [
        h(
          "button",
          {
            class: "bare v-name",
            onclick: () => onSelect(id),
            vars: { "--owner": `var(--cat-${names.color(id)})` },
          },
          names.name(id, choice),
        ),
        h("span", { text: kind }),
        h("span", {
          class: "secondary",
          title: KIND_TEXTS[kind],
          text:
            count === 1
              ? `position ${start} (from 0)`
              : `positions ${start} to ${start + count - 1} (from 0)`,
        }),
        drafted
          ? h("span", {
              class: "secondary",
              title: DRAFTS_TEXT,
              text: `${accepted} of ${drafted} drafted accepted`,
            })
          : null,
      ]),
    );
    replace(
      details,
      h("h3", { text: stepText(record) }),
      h("ul", { class: "row v-sequences" }, list),
    );
    canvas.setAttribute(
      "aria-label",
      `Timeline of steps. Step ${record.step}: ${formatThings(record.num_tokens, "token")} of ` +
        `${formatThings(record.sequences.length, "sequence")}. The list below names them.`,
    );
  }

  /** @param {PointerEvent | MouseEvent} event */
  function at(event) {
    const shown = visible();
    const record = shown[Math.floor((event.offsetX - LABEL_PX) / COLUMN_PX)];
    const row = rows[Math.floor((event.offsetY - TOTAL_PX - AXIS_PX) / ROW_PX)];
    return { record, row };
  }
  canvas.addEventListener("pointermove", (event) => {
    const { record } = at(event);
    if (hovered === (record?.step ?? null)) return;
    hovered = record?.step ?? null;
    draw();
  });
  canvas.addEventListener("pointerleave", () => {
    hovered = null;
    draw();
  });
  canvas.addEventListener("click", (event) => {
    const { record, row } = at(event);
    if (event.offsetX < LABEL_PX) {
      if (row) onSelect(row.id);
    } else if (record) onWatch(record.step);
  });
  new ResizeObserver(draw).observe(frame);

  return {
    element: h("div", { class: "stack tight" }, [legend, frame, omitted, details]),
    draw,
    /** @param {{records: StepRecord[], record: StepRecord | null, step: number | null, maxTokens: number}} shown */
    update({ records: newRecords, record, step, maxTokens }) {
      records = newRecords;
      watched = step;
      budget = maxTokens;
      budgetText.textContent =
        "Bars above: tokens of a step, prompt in colour, decode in grey; at most " +
        `${formatCount(maxTokens)} a step.`;
      frame.hidden = legend.hidden = !records.length;
      draftsKey.hidden = !records.some(({ sequences }) => draftsOf(sequences).some(Boolean));
      draw();
      showDetails(record);
    },
    /** @param {string | null} id */
    select(id) {
      selected = id;
      draw();
    },
  };
}

/**
 * @typedef {{context: CanvasRenderingContext2D, shown: StepRecord[],
 *   palette: ReturnType<typeof readPalette>}} Drawing
 */

/** Return the colours of the theme. */
function readPalette() {
  return {
    text: token("--text-2"),
    strong: token("--text"),
    grid: token("--border"),
    accent: token("--accent"),
    surface: token("--surface"),
    soft: token("--accent-soft"),
    danger: token("--danger"),
    prompt: token("--accent"),
    decode: token("--border-strong"),
    owners: Array.from({ length: 8 }, (_, index) => categoricalColor(index)),
  };
}

/** @param {StepRecord} record */
function stepText(record) {
  const prompt = formatThings(record.num_prompt_tokens, "prompt token");
  const decode = formatThings(record.num_decode_tokens, "decode token");
  const sequences = formatThings(record.sequences.length, "sequence");
  const duration = formatDuration(record.duration_s);
  const [accepted, rejected] = draftsOf(record.sequences);
  const all = accepted + rejected;
  const drafts = all ? ` (${accepted} of ${formatThings(all, "drafted token")} accepted)` : "";
  const step = `Step ${formatCount(record.step)}`;
  return `${step}: ${prompt}, ${decode}${drafts}, ${sequences} in ${duration}`;
}

/** Return the number of accepted and of rejected tokens of drafts. @param {Sequence[]} sequences */
function draftsOf(sequences) {
  let drafted = 0;
  let accepted = 0;
  for (const sequence of sequences) {
    drafted += sequence.drafted ?? 0;
    accepted += sequence.accepted ?? 0;
  }
  return [accepted, drafted - accepted];
}

/** @param {HTMLElement} draftsKey @param {HTMLElement} budgetText */
function timelineLegend(draftsKey, budgetText) {
  /** @param {string} name @param {string} text */
  const item = (name, text) => h("span", {}, h("span", { class: `v-key ${name}` }), text);
  return h("div", { class: "row legend" }, [
    item("v-key-prefill", "prefill"),
    item("v-key-chunk", "chunk of a prompt"),
    item("v-key-decode", "decode"),
    draftsKey,
    h("span", { text: "× preempted" }),
    h("span", { text: "▪ finished" }),
    h("span", { text: "┊ steps not recorded" }),
    budgetText,
  ]);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {number} x1
 * @param {number} y1
 * @param {number} x2
 * @param {number} y2
 */
function line(context, x1, y1, x2, y2) {
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
  context.stroke();
}
