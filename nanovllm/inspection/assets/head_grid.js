/** The kinds of attention head, and the grid of small maps of all heads. */

import { append, h } from "./dom.js";
import { formatNumber, formatPercent } from "./format.js";
import { paintTriangle } from "./heatmap.js";

const THUMBNAIL_PX = 64;
const CHIP_SHARE = 0.4; // minimum mean weight of a kind for its label

/** The kinds of head that the overview finds; the statistics are mean weights over the prompt. */
export const HEAD_KINDS = [
  {
    key: "previous_token",
    name: "Previous token",
    chip: "previous",
    what: "the token just before",
  },
  { key: "first_token", name: "First token", chip: "first", what: "the first token of the prompt" },
  { key: "self", name: "Same token", chip: "same", what: "the query token itself" },
  {
    key: "induction",
    name: "Induction",
    chip: "induction",
    what: "the token that followed the last time this one appeared",
  },
];

/** Return what a head does, as a sentence. @param {any} head an entry of the overview */
export function describeHead(head) {
  const shares = HEAD_KINDS.filter(({ key }) => head[key] >= 0.1)
    .sort((a, b) => head[b.key] - head[a.key])
    .map(({ key, what }) => `${formatPercent(head[key])} on ${what}`);
  const where = shares.length ? `On average ${shares.join(", ")}.` : "Its weights are spread out.";
  return (
    `${where} Mean distance ${formatNumber(head.distance)} tokens, ` +
    `mean entropy ${formatNumber(head.entropy)} nats.`
  );
}

function chipsOf(head) {
  return HEAD_KINDS.filter(({ key }) => head[key] >= CHIP_SHARE);
}

/**
 * Return the grid: a row for each layer, a column for each head.
 * @param {any[]} heads
 * @param {number[]} layers
 * @param {number[]} headNumbers
 * @param {(head: any) => void} onSelect
 */
export function headGrid(heads, layers, headNumbers, onSelect) {
  const tiles = new Map();
  const element = h("div", {
    class: headNumbers.length > 8 ? "v-grid v-grid-many" : "v-grid",
    vars: { "--heads": headNumbers.length },
  });
  append(element, [
    h("span", { class: "v-grid-corner", text: "layer \\ head" }),
    headNumbers.map((head) => h("span", { class: "v-grid-label", text: `${head}` })),
  ]);
  for (const layer of layers) {
    element.append(h("span", { class: "v-grid-label", text: `${layer}` }));
    for (const head of heads.filter((one) => one.layer === layer)) {
      const canvas = h("canvas", {
        class: "v-thumbnail",
        width: 1,
        height: 1,
        "aria-hidden": "true",
      });
      const chips = chipsOf(head);
      const names = chips.map(({ name }) => name.toLowerCase()).join(", ");
      const tile = h(
        "button",
        {
          type: "button",
          class: "v-head",
          onclick: () => onSelect(head),
          "aria-label": `Layer ${head.layer}, head ${head.head}${names && `: ${names}`}`,
          title: `Layer ${head.layer}, head ${head.head}\n${describeHead(head)}`,
        },
        canvas,
        chips.length > 0 && h("span", { class: "v-chip", text: chips[0].chip }),
      );
      tiles.set(`${layer} ${head.head}`, { tile, canvas, head });
      element.append(tile);
    }
  }
  return {
    element: h(
      "div",
      { class: "v-grid-scroll", tabindex: 0, role: "region", "aria-label": "Maps of all heads" },
      element,
    ),
    select(selected) {
      for (const { tile, head } of tiles.values()) {
        tile.setAttribute("aria-pressed", String(head === selected));
      }
    },
    paint(layer, head, size, weightAt) {
      paintTriangle(
        tiles.get(`${layer} ${head}`).canvas,
        size,
        weightAt,
        Math.min(size, THUMBNAIL_PX),
      );
    },
  };
}
