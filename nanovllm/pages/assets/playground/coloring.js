/** The choice of what colours tokens, with its legend. */

import { segmented } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { legend } from "./token_text.js";

/**
 * Return the control. `value` returns the chosen colouring.
 * @param {{onchange: () => void}} options
 */
export function coloringControl({ onchange }) {
  /** @type {import("./token_text.js").Coloring} */
  let value = "probability";
  const scale = h("div", {}, legend(value));
  const colors = segmented({
    label: "Colour of the tokens",
    options: [
      { value: "probability", label: "Probability" },
      { value: "entropy", label: "Entropy" },
      { value: "none", label: "None" },
    ],
    value,
    onchange: (chosen) => {
      value = /** @type {typeof value} */ (chosen);
      replace(scale, legend(value));
      onchange();
    },
  });
  return { element: h("div", { class: "row toolbar" }, colors, scale), value: () => value };
}
