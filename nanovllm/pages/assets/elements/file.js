/** What the scripts of self-contained files share: the data in the file, and its theme. */

import { button } from "./components.js";
import { append, byId } from "./dom.js";

/**
 * Show the data of the file.
 * @param {(data: any) => import("./dom.js").Child} view
 */
export function showData(view) {
  append(byId("main"), [view(JSON.parse(byId("data").textContent ?? ""))]);
  const onclick = () => document.dispatchEvent(new Event("themechoice"));
  byId("actions").append(button("Light or dark", { small: true }, onclick));
}
