/** The last runs of the Playground. A reload keeps them, a closed tab does not. */

import { ended } from "../client/generation.js";
import { button } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { formatThings } from "../elements/format.js";
import { forget, load, MAX_CHARACTERS, store, write } from "../elements/saved.js";

/**
 * @import { Choice } from "../client/generation.js"
 * @import { Run } from "./playground.js"
 */

const MAX_RUNS = 20;
const MAX_TOKENS = 20_000;
const NAME = "playground.runs";

/** Return the runs, newest first. @param {{onselect: (run: Run) => void}} options */
export function runHistory({ onselect }) {
  /** @type {Run[]} */
  let runs = load(NAME, (stored) => stored.map(restored)) ?? [];
  /** @type {Run | null} */
  let shown = null;
  const list = h("ol", { class: "stack history" });
  const clear = button(
    "Clear",
    { kind: "quiet", small: true, "aria-label": "Clear the history" },
    () => {
      runs = [];
      forget(NAME);
      update();
    },
  );
  const element = h("section", { class: "card side-card history-card" }, [
    h("div", { class: "row between" }, h("h3", { text: "History" }), clear),
    list,
  ]);

  /** @param {Run} run */
  function item(run) {
    const { choices, mode, note, prompts, sent, started } = run;
    const hasFailed = choices.some(({ status }) => status === "failed");
    const end = hasFailed ? "failed" : formatThings(countTokens(choices), "token");
    const named = (/** @type {string} */ name) => name in sent && `${name} ${sent[name]}`;
    const which = [started.toLocaleTimeString(), named("seed"), named("temperature")];
    const attributes = { class: "bare history-item", onclick: () => onselect(run) };
    /** @param {any[]} parts */
    const line = (parts) =>
      h("span", { class: "secondary small-text", text: parts.filter(Boolean).join(" · ") });
    return h("button", { ...attributes, "aria-current": run === shown && "true" }, [
      h("span", { class: "ellipsis", text: prompts.join(" | ") }),
      line([mode, note, end]),
      line(which),
    ]);
  }

  /** Show the runs again, and forget old ones that have too many tokens together. */
  function update() {
    let numTokens = 0;
    runs = runs.filter((run, index) => {
      numTokens += countTokens(run.choices);
      return index === 0 || numTokens <= MAX_TOKENS;
    });
    clear.hidden = !runs.length;
    const hint = h("li", {
      class: "secondary small-text",
      text: "Your runs, until the tab is closed.",
    });
    replace(list, runs.length ? runs.map((run) => h("li", {}, item(run))) : hint);
  }

  update();
  return {
    element,
    update,
    /** Return the newest run, if there is one. */
    newest: () => runs.at(0),
    /** Show a run and mark it; a new one is put first. @param {Run} run */
    show(run) {
      if (!runs.includes(run)) runs = [run, ...runs].slice(0, MAX_RUNS);
      shown = run;
      update();
    },
    /** Store the newest runs, as many as the browser has room for. */
    save() {
      let numCharacters = 0;
      const texts = runs.map(write).filter((text) => {
        numCharacters += text.length;
        return numCharacters <= MAX_CHARACTERS;
      });
      store(NAME, `[${texts.join(",")}]`);
    },
  };
}

/** Return a stored run. @param {any} run @returns {Run} */
function restored(run) {
  return { ...run, started: new Date(run.started), choices: run.choices.map(ended) };
}

/** Return the number of tokens of choices. @param {Choice[]} choices */
export function countTokens(choices) {
  return choices.reduce((sum, { tokens }) => sum + tokens.length, 0);
}
