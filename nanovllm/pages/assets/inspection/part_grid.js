/** The grid of a network's parts: a row for each layer; columns for heads, sublayers and block. */

import { colorScale, onThemeChange } from "../charts/colors.js";
import { append, h, rovingFocus } from "../elements/dom.js";

/**
 * @typedef {{layer: number, kind: "head" | "attention" | "ffn" | "block", head: number | null}} Part
 * @typedef {Part & {loss: number | null}} PartLoss
 */

/** @type {Record<string, string>} */
const NAMES = { attention: "attention", ffn: "feed-forward", block: "block" };
/** @type {Record<string, string>} */
const LABELS = { attention: "attn", ffn: "ffn", block: "block" };

/** Return all parts of a network. @param {number} layers @param {number} heads */
export function partsOf(layers, heads) {
  /** @type {Part[]} */
  const parts = [];
  for (let layer = 0; layer < layers; layer += 1) {
    for (let head = 0; head < heads; head += 1) parts.push({ layer, kind: "head", head });
    for (const kind of /** @type {const} */ (["attention", "ffn", "block"])) {
      parts.push({ layer, kind, head: null });
    }
  }
  return parts;
}

/** Return the name of a part in its layer. @param {Part} part */
export function kindName({ kind, head }) {
  return head === null ? NAMES[kind] : `head ${head}`;
}

/** Return the name of a part. @param {Part} part */
export function partName(part) {
  return `layer ${part.layer}, ${kindName(part)}`;
}

/** Return a change of the loss with its sign. @param {number | null} change in nats per token */
export function formatChange(change, digits = 2) {
  if (change === null) return "–";
  return `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(digits)}`;
}

/**
 * Return the grid. With `onToggle` its cells are buttons that stay pressed.
 * @param {Part[]} parts layer by layer, the same kinds in each
 * @param {(part: Part) => void} [onToggle]
 */
export function partGrid(parts, onToggle) {
  const first = parts.filter(({ layer }) => layer === parts[0].layer);
  const numHeads = first.filter(({ kind }) => kind === "head").length;
  /** Keep a click although the cell moves before the release. @param {PointerEvent} event */
  const onpointerdown = ({ pointerId, button, currentTarget }) =>
    button === 0 && /** @type {Element} */ (currentTarget).setPointerCapture(pointerId);
  const cells = parts.map((part) =>
    onToggle
      ? h("button", {
          class: "v-part v-shaded",
          tabindex: -1,
          onpointerdown,
          onclick: () => onToggle(part),
        })
      : h("span", { class: "v-part v-shaded" }),
  );
  const element = h("div", {
    class: "v-part-grid",
    vars: { "--heads": numHeads, "--others": first.length - numHeads },
  });
  append(element, [
    h("span", { class: "v-grid-corner", text: numHeads ? "layer \\ head" : "layer" }),
    first.map(({ kind, head }) =>
      h("span", { class: "v-grid-label", text: head ?? LABELS[kind], title: NAMES[kind] }),
    ),
    parts.map((part, index) => [
      index % first.length === 0 && h("span", { class: "v-grid-label", text: part.layer }),
      cells[index],
    ]),
  ]);
  if (onToggle) rovingFocus(element, ".v-part", first.length);
  cells[0].tabIndex = onToggle ? 0 : -1;
  /** @type {(number | null)[]} */
  let changes = parts.map(() => null);

  function paint() {
    const colorOf = colorScale();
    /** @param {boolean} isHead */
    const largest = (isHead) =>
      Math.max(
        ...changes.map((change, at) => ((parts[at].head !== null) === isHead && change) || 0),
      );
    const scales = { head: largest(true), other: largest(false) };
    for (const [index, cell] of cells.entries()) {
      const change = changes[index];
      const scale = parts[index].head === null ? scales.other : scales.head;
      const share = change === null ? null : Math.sqrt(Math.max(change, 0) / (scale || 1));
      cell.style.setProperty("--shade", share === null ? "transparent" : colorOf(share));
      cell.textContent = change === null ? "" : formatChange(change);
      const measured = change === null ? "" : `: loss ${formatChange(change, 4)} without it`;
      cell.title = `${partName(parts[index])}${measured}`;
      if (onToggle) cell.setAttribute("aria-label", cell.title);
    }
  }
  onThemeChange(element, paint);
  paint();
  return {
    element: h("div", { class: "v-grid-scroll", role: "group", "aria-label": "Parts" }, element),
    /** Show the change of the loss without each part. @param {(number | null)[]} values */
    show(values) {
      changes = values;
      paint();
    },
    /** Mark the parts that are off. @param {Set<Part>} off */
    mark(off) {
      for (const [index, part] of parts.entries()) {
        cells[index].setAttribute("aria-pressed", String(off.has(part)));
      }
    },
  };
}
