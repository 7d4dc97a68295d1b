/** A table whose rows can be sorted by each column. */

import { h, replace } from "./dom.js";

/**
 * Return a table whose rows can be sorted by a click on a column's name.
 * @param {{caption: string, columns: {key: string, label: string, title?: string,
 *   format: (value: any) => string}[], rows: any[], sortKey: string,
 *   onSelect: (row: any) => void, isSelected: (row: any) => boolean}} options
 */
export function sortableTable({ caption, columns, rows, sortKey, onSelect, isSelected }) {
  let key = sortKey;
  let direction = -1;
  const body = h("tbody");
  const heads = columns.map((column) =>
    h("th", { scope: "col", title: column.title ?? null }, [
      h("button", { class: "bare v-sort", text: column.label, onclick: () => sort(column.key) }),
    ]),
  );
  /** @param {string} next */
  function sort(next) {
    direction = next === key ? -direction : -1;
    key = next;
    render();
  }
  function render() {
    const sorted = [...rows].sort((a, b) => direction * ((a[key] ?? -1) - (b[key] ?? -1)));
    heads.forEach((head, index) => {
      const name = direction < 0 ? "descending" : "ascending";
      head.setAttribute("aria-sort", columns[index].key === key ? name : "none");
    });
    replace(body, [
      sorted.map((row) =>
        h("tr", { class: isSelected(row) ? "v-selected" : null, onclick: () => onSelect(row) }, [
          columns.map((column) => h("td", { text: column.format(row[column.key]) })),
        ]),
      ),
    ]);
  }
  render();
  const table = h("table", { class: "v-table" }, [
    h("caption", { class: "visually-hidden", text: caption }),
    h("thead", {}, h("tr", {}, heads)),
    body,
  ]);
  return {
    element: h(
      "div",
      { class: "v-table-scroll", tabindex: 0, role: "region", "aria-label": caption },
      table,
    ),
    render,
    sort,
  };
}
