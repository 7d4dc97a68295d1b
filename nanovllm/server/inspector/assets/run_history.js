/** The last runs of the Playground. They are kept in memory, until the page is closed. */

import { h, replace } from "./dom.js";

const MAX_RUNS = 20;
const MAX_TOKENS = 20_000;

/** @typedef {import("./playground.js").Run} Run */

/** Shows the runs, newest first. */
export class RunHistory {
  /** @param {{onselect: (run: Run) => void}} options */
  constructor({ onselect }) {
    this.onselect = onselect;
    /** @type {Run[]} */
    this.runs = [];
    this.element = h("ol", { class: "history" });
    this.update();
  }

  /** Put a run first. @param {Run} run */
  add(run) {
    this.runs = [run, ...this.runs.filter((other) => other !== run)].slice(0, MAX_RUNS);
    this.update();
  }

  /** Show the runs again, and forget old ones that have too many tokens together. */
  update() {
    let numTokens = 0;
    this.runs = this.runs.filter((run, index) => {
      numTokens += countTokens(run.choices);
      return index === 0 || numTokens <= MAX_TOKENS;
    });
    replace(
      this.element,
      this.runs.map((run, index) => h("li", {}, this.#item(run, index === 0))),
      !this.runs.length
        && h("li", { class: "secondary small-text", text: "Your runs, until the page is closed." }),
    );
  }

  /**
   * @param {Run} run
   * @param {boolean} isShown
   */
  #item(run, isShown) {
    const hasFailed = run.choices.some((choice) => choice.status === "failed");
    const end = hasFailed ? "failed" : `${countTokens(run.choices)} tokens`;
    const named = (/** @type {string} */ name) => name in run.body && `${name} ${run.body[name]}`;
    const what = [run.mode, run.note, end].filter(Boolean);
    const which = [run.started.toLocaleTimeString(), named("seed"), named("temperature")];
    return h(
      "button",
      {
        type: "button", class: "bare history-item", "aria-current": isShown && "true",
        onclick: () => this.onselect(run),
      },
      h("span", { class: "history-prompt", text: run.prompts.join(" | ") }),
      h("span", { class: "history-what", text: what.join(" · ") }),
      h("span", { class: "history-what", text: which.filter(Boolean).join(" · ") }),
    );
  }
}

/** Return the number of tokens of choices. @param {import("./generation.js").Choice[]} choices */
export function countTokens(choices) {
  return choices.reduce((sum, choice) => sum + choice.tokens.length, 0);
}
