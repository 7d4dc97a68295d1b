/** The grid of small maps of all heads. */

import { paintTriangle } from "../charts/heatmap.js";
import { append, h, rovingFocus } from "../elements/dom.js";
import { clearKinds, describeHead } from "./head_kinds.js";

/** @import { Head } from "./head_kinds.js" */

const THUMBNAIL_PX = 64;

/**
 * Return the grid: a row for each layer, a column for each head.
 * @param {Head[]} heads
 * @param {number[]} layers
 * @param {number[]} headNumbers
 * @param {(head: Head) => void} onSelect
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
      const chips = clearKinds(head);
      const names = chips.map(({ name }) => name.toLowerCase()).join(", ");
      const tile = h(
        "button",
        {
          class: "v-head",
          tabindex: -1,
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
  rovingFocus(element, ".v-head", headNumbers.length);
  return {
    element: h(
      "div",
      { class: "v-grid-scroll", role: "group", "aria-label": "Maps of all heads" },
      element,
    ),
    /** @param {Head} selected */
    select(selected) {
      for (const { tile, head } of tiles.values()) {
        tile.setAttribute("aria-pressed", String(head === selected));
        tile.tabIndex = head === selected ? 0 : -1;
      }
    },
    /**
     * @param {number} layer
     * @param {number} head
     * @param {number} size
     * @param {(query: number, key: number) => number} weightAt
     */
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
