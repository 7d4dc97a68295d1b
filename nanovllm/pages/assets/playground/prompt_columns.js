/** The prompts of the Playground, side by side. */

import { button } from "../elements/components.js";
import { h, uniqueId } from "../elements/dom.js";

/** @typedef {{element: HTMLElement, input: any, title: any, remove: HTMLButtonElement}} Column */

export const MAX_PROMPTS = 4;

/** Return at least one prompt. `addButton` adds another beside them. */
export function promptColumns() {
  /** @type {Column[]} */
  let columns = [];
  const element = h("div", { class: "prompt-grid" });
  const onclick = () => {
    add("");
    focus(-1);
  };
  const addButton = button("Add a prompt", { icon: "plus", kind: "quiet" }, onclick);
  addButton.lastElementChild?.classList.add("hidden-on-phone");

  /** Focus a prompt. @param {number} index from the end where it is negative */
  const focus = (index) => columns.at(index)?.input.focus();

  /** @param {string} text */
  function add(text) {
    const input = h("textarea", {
      class: "textarea prompt-input",
      rows: 2,
      value: text,
      placeholder: "Enter a prompt",
      id: uniqueId("prompt"),
    });
    const title = h("label", { class: "prompt-title", for: input.id });
    const remove = button(
      "Remove this prompt",
      { icon: "close", iconOnly: true, kind: "quiet", small: true },
      () => {
        columns = columns.filter((other) => other !== column);
        column.element.remove();
        rename();
        focus(-1);
      },
    );
    const header = h("div", { class: "prompt-header" }, title, remove);
    const column = { element: h("div", {}, header, input), input, title, remove };
    columns.push(column);
    element.append(column.element);
    rename();
  }

  function rename() {
    const isOne = columns.length === 1;
    columns.forEach(({ title, remove }, index) => {
      title.textContent = isOne ? "Prompt" : `Prompt ${index + 1}`;
      title.parentElement.classList.toggle("visually-hidden", isOne);
      remove.hidden = isOne;
    });
    addButton.disabled = columns.length === MAX_PROMPTS;
  }

  return {
    element,
    addButton,
    focus,
    /** Return the texts of the prompts. @returns {string[]} */
    texts: () => columns.map(({ input }) => input.value),
    /** Replace all prompts. @param {string[]} texts */
    replace(texts) {
      for (const column of columns) column.element.remove();
      columns = [];
      texts.slice(0, MAX_PROMPTS).forEach(add);
    },
  };
}
