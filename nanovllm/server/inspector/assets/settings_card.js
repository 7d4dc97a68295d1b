/** The card around settings: folded where the window has one column. */

import { h } from "./dom.js";

const ONE_COLUMN = "(max-width: 1023px)"; // as in playground.css

/** Return the card. @param {...any} content */
export function settingsCard(...content) {
  return h(
    "details",
    { class: "card side-card settings-card", open: !matchMedia(ONE_COLUMN).matches },
    h("summary", { class: "settings-summary" }, h("h3", { text: "Settings" })),
    content,
  );
}
