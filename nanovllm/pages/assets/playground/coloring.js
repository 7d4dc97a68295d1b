/** The choice of what colours tokens, with its legend. Drafts are one where the server drafts. */

import { segmented } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { legend } from "./token_text.js";

/**
 * Return the control. `value` returns the chosen colouring of a text.
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
      { value: "drafts", label: "Drafts" },
      { value: "none", label: "None" },
    ],
    value,
    onchange: (chosen) => {
      value = /** @type {typeof value} */ (chosen);
      replace(scale, legend(value));
      onchange();
    },
  });
  const drafts = colors.children[2];
  drafts.toggleAttribute("hidden", true);
  return {
    element: h("div", { class: "row toolbar" }, colors, scale),
    /** @param {import("../client/generation.js").Choice | null} choice */
    value(choice) {
      if (choice?.hasDrafts) drafts.removeAttribute("hidden");
      return value;
    },
  };
}
