/** The table of an engine of the course: whose code each part is. */

import { card } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";

const LEAD =
  "This engine runs the code of a reader of the course. A part that is not written there is this " +
  "project's.";

/** Return the table; it is hidden unless the backend is learn:DIR. */
export function codeTable() {
  const body = h("tbody");
  const head = h("tr", {}, [
    h("th", { scope: "col", text: "Part" }),
    h("th", { scope: "col", text: "Code" }),
  ]);
  const table = h("table", { class: "v-code-table" }, [h("thead", {}, head), body]);
  const element = card("Whose code runs", { lead: LEAD, hidden: true }, [table]);
  let shown = "";
  return {
    element,
    /** @param {{part: string, is_readers: boolean}[]} parts of the engine's settings */
    update(parts) {
      const text = JSON.stringify(parts);
      if (text === shown) return;
      shown = text;
      element.hidden = parts.length === 0;
      replace(
        body,
        parts.map(({ part, is_readers: isReaders }) =>
          h("tr", {}, [
            h("td", { text: part }),
            h("td", { text: isReaders ? "yours" : "the project's" }),
          ]),
        ),
      );
    },
  };
}
