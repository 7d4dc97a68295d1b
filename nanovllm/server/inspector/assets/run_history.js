/** The last runs of the Playground. A reload keeps them, a closed tab does not. */

import { button } from "./components.js";
import { h, replace } from "./dom.js";
import { MAX_CHARACTERS, ended, forget, load, store, write } from "./saved.js";

const MAX_RUNS = 20;
const MAX_TOKENS = 20_000;
const NAME = "playground.runs";

/** @typedef {import("./playground.js").Run} Run */

/** Shows the runs, newest first. */
export class RunHistory {
  /** @param {{onselect: (run: Run) => void}} options */
  constructor({ onselect }) {
    this.onselect = onselect;
    /** @type {Run[]} */
    this.runs = load(NAME, (runs) => runs.map(restored)) ?? [];
    /** @type {Run | null} */
    this.shown = null;
    this.list = h("ol", { class: "history" });
    this.clearButton = button({
      label: "Clear", kind: "quiet", small: true, "aria-label": "Clear the history",
      onclick: () => this.#clear(),
    });
    const title = h("h3", { text: "History" });
    this.element = h(
      "section",
      { class: "card side-card history-card" },
      h("div", { class: "row between" }, title, this.clearButton),
      this.list,
    );
    this.update();
  }

  /** Put a run first. @param {Run} run */
  add(run) {
    this.runs = [run, ...this.runs.filter((other) => other !== run)].slice(0, MAX_RUNS);
    this.show(run);
  }

  /** Mark the run whose result is shown. @param {Run} run */
  show(run) {
    this.shown = run;
    this.update();
  }

  #clear() {
    this.runs = [];
    forget(NAME);
    this.update();
  }

  /** Store the newest runs, as many as the browser has room for. */
  save() {
    let numCharacters = 0;
    const texts = this.runs.map(write).filter((text) => {
      numCharacters += text.length;
      return numCharacters <= MAX_CHARACTERS;
    });
    store(NAME, `[${texts.join(",")}]`);
  }

  /** Show the runs again, and forget old ones that have too many tokens together. */
  update() {
    let numTokens = 0;
    this.runs = this.runs.filter((run, index) => {
      numTokens += countTokens(run.choices);
      return index === 0 || numTokens <= MAX_TOKENS;
    });
    this.clearButton.hidden = !this.runs.length;
    replace(
      this.list,
      this.runs.map((run) => h("li", {}, this.#item(run, run === this.shown))),
      !this.runs.length
        && h("li", { class: "secondary small-text", text: "Your runs, until the tab is closed." }),
    );
  }

  /**
   * @param {Run} run
   * @param {boolean} isShown
   */
  #item(run, isShown) {
    const hasFailed = run.choices.some((choice) => choice.status === "failed");
    const end = hasFailed ? "failed" : `${countTokens(run.choices)} tokens`;
    const named = (/** @type {string} */ name) => name in run.sent && `${name} ${run.sent[name]}`;
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

/** Return a stored run. @param {any} run */
function restored(run) {
  return { ...run, started: new Date(run.started), choices: run.choices.map(ended) };
}

/** Return the number of tokens of choices. @param {import("./generation.js").Choice[]} choices */
export function countTokens(choices) {
  return choices.reduce((sum, choice) => sum + choice.tokens.length, 0);
}
