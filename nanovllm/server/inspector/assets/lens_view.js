/** The view "Logit lens". */

import { emptyState, h } from "./dom.js";

/** @param {import("./main.js").Context} context */
export function create(context) {
  const empty = emptyState({ title: "Logit lens", text: "Not built yet." });
  return { element: h("div", { class: "view" }, empty), show() {}, hide() {} };
}
