/** A file of `nanovllm ablate`: the loss without each part as a map and as a table. */

import { card } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { sortableTable } from "../elements/sortable_table.js";
import { formatChange, kindName, partGrid } from "./part_grid.js";

/** @import { PartLoss } from "./part_grid.js" */

const LEAD =
  "A cell is the rise of the loss, in nats per token, while this part alone is switched off: it " +
  "then adds nothing to the residual stream. attn and ffn are the attention and feed-forward " +
  "sublayers of a layer, block is both. The colour is the square root of the rise; heads have a " +
  "scale of their own.";

/**
 * Return the map and the table.
 * @param {{loss: number | null, parts: PartLoss[]}} data
 */
export function ablationExplorer({ loss, parts }) {
  const changes = parts.map((part) =>
    part.loss === null || loss === null ? null : part.loss - loss,
  );
  const grid = partGrid(parts);
  grid.show(changes);
  const rows = parts.map((part, index) => ({ ...part, index, change: changes[index] }));
  const table = sortableTable({
    caption: "Loss without each part",
    columns: [
      { key: "layer", label: "Layer", format: String },
      { key: "index", label: "Without", format: (index) => kindName(parts[index]) },
      { key: "loss", label: "Loss", format: (value) => value?.toFixed(4) ?? "–" },
      { key: "change", label: "Change", format: (change) => formatChange(change, 4) },
    ],
    rows,
    sortKey: "change",
    onSelect: () => {},
    isSelected: () => false,
  });
  return h("div", { class: "stack" }, [
    card("What each part contributes", { lead: LEAD }, [grid.element]),
    card("All parts, sortable", {}, [table.element]),
  ]);
}
