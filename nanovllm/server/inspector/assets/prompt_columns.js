/** The prompts of the Playground, side by side. */

import { button } from "./components.js";
import { h, uniqueId } from "./dom.js";

export const MAX_PROMPTS = 4;

/** Shows at least one prompt. `addButton` adds another beside them. */
export class PromptColumns {
  constructor() {
    /** @type {{element: HTMLElement, input: any, title: any, remove: HTMLButtonElement}[]} */
    this.columns = [];
    this.element = h("div", { class: "prompt-grid" });
    this.addButton = button({
      label: "Add a prompt", icon: "plus", kind: "quiet",
      onclick: () => {
        this.#add("");
        this.focus(-1);
      },
    });
    this.addButton.classList.add("add-prompt");
  }

  /** Return the texts of the prompts. */
  texts() {
    return this.columns.map(({ input }) => input.value);
  }

  /** Replace all prompts. @param {string[]} texts */
  replace(texts) {
    this.columns.forEach(({ element }) => element.remove());
    this.columns = [];
    texts.slice(0, MAX_PROMPTS).forEach((text) => this.#add(text));
  }

  /** Focus a prompt. @param {number} index from the end where it is negative */
  focus(index) {
    this.columns.at(index).input.focus();
  }

  /** @param {string} text */
  #add(text) {
    const input = h("textarea", {
      class: "textarea prompt-input", rows: 2, value: text, placeholder: "Enter a prompt",
      id: uniqueId("prompt"),
    });
    const title = h("label", { class: "prompt-title", for: input.id });
    const remove = button({
      label: "Remove this prompt", icon: "close", iconOnly: true, kind: "quiet", small: true,
      onclick: () => {
        this.columns = this.columns.filter((other) => other !== column);
        column.element.remove();
        this.#rename();
        this.focus(-1);
      },
    });
    const header = h("div", { class: "prompt-header" }, title, remove);
    const element = h("div", { class: "prompt-column" }, header, input);
    const column = { element, input, title, remove };
    this.columns.push(column);
    this.element.append(element);
    this.#rename();
  }

  #rename() {
    const isOne = this.columns.length === 1;
    this.columns.forEach(({ title, remove }, index) => {
      title.textContent = isOne ? "Prompt" : `Prompt ${index + 1}`;
      title.parentElement.classList.toggle("visually-hidden", isOne);
      remove.hidden = isOne;
    });
    this.addButton.disabled = this.columns.length === MAX_PROMPTS;
  }
}
