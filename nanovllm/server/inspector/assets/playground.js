/** The view "Playground": prompts side by side, generated or scored token by token. */

import * as dom from "./dom.js";
import { ChoiceView } from "./choice_view.js";
import { allIds, branchAt, generate, newChoice, score } from "./generation.js";
import { createSettings } from "./sampling_settings.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { legend } from "./token_text.js";
import { Vocabulary } from "./vocabulary.js";

const { button, h, replace } = dom;
const MAX_PROMPTS = 4;
const MAX_RUNS = 20;
const MAX_HISTORY_TOKENS = 20_000;
const FIRST_PROMPT = "Once upon a time, there was a";

/**
 * @typedef {{mode: "generate" | "score", prompts: string[], body: Record<string, any>,
 *   choices: import("./generation.js").Choice[], settings: Record<string, any>,
 *   numAlternatives: number, note: string}} Run
 */

/** @param {import("./main.js").Context} context */
export function create(context) {
  const playground = new Playground(context);
  return { element: playground.element, show() {}, hide: dom.hideTooltip };
}

class Playground {
  /** @param {import("./main.js").Context} context */
  constructor({ api, store, announce }) {
    this.api = api;
    this.store = store;
    this.announce = announce;
    this.vocabulary = new Vocabulary(api);
    this.settings = createSettings();
    /** @type {{element: HTMLElement, input: any, title: any, remove: HTMLButtonElement}[]} */
    this.columns = [];
    /** @type {Run | null} */
    this.run = null;
    /** @type {Run[]} */
    this.history = [];
    /** @type {Map<import("./generation.js").Choice, ChoiceView>} */
    this.views = new Map();
    /** @type {Set<import("./generation.js").Choice>} */
    this.changed = new Set();
    /** @type {AbortController | null} */
    this.controller = null;
    this.mode = /** @type {"generate" | "score"} */ ("generate");
    this.coloring = /** @type {import("./token_text.js").Coloring} */ ("probability");
    this.element = this.#build();
    this.#addColumn(FIRST_PROMPT);
    this.#showHistory();
  }

  #build() {
    this.grid = h("div", { class: "prompt-grid" });
    this.resultGrid = h("div", { class: "prompt-grid", hidden: true });
    this.hint = dom.emptyState({
      title: "No tokens yet",
      text: "Each token shows its probability, its rank and the alternatives. "
        + "Choose an alternative to continue from there.",
    });
    this.problem = h("div", { hidden: true });
    this.legend = h("div", {}, legend(this.coloring));
    this.historyList = h("ol", { class: "history" });
    this.startButton = button({
      label: "Generate", icon: "play", kind: "primary", onclick: () => this.#start(),
      title: "Ctrl+Enter", "aria-keyshortcuts": "Control+Enter",
    });
    this.stopButton = button({
      label: "Stop", icon: "stop", kind: "danger", onclick: () => this.controller?.abort(),
      disabled: true,
    });
    this.addButton = button({
      label: "Add a prompt", icon: "plus", kind: "quiet",
      onclick: () => this.#addColumn("").focus(),
    });
    return h(
      "div",
      { class: "playground" },
      h("h2", { class: "visually-hidden", text: "Playground" }),
      h(
        "div",
        { class: "playground-main stack" },
        this.grid,
        h(
          "div",
          { class: "row between actions-row" },
          h(
            "div",
            { class: "row" },
            this.#modeControl(), this.startButton, this.stopButton, this.addButton,
          ),
          h(
            "div",
            { class: "row" },
            this.#copyButton("Copy as curl", "curl command", curlCommand),
            this.#copyButton("Copy as Python", "Python program", pythonProgram),
          ),
        ),
        this.problem,
        this.#colorRow(),
        this.hint,
        this.resultGrid,
      ),
      h(
        "aside",
        { class: "playground-side stack", "aria-label": "Settings and history" },
        h("section", { class: "card side-card" }, h("h3", { text: "Settings" }),
          this.settings.element),
        h("section", { class: "card side-card" }, h("h3", { text: "History" }), this.historyList),
      ),
    );
  }

  #modeControl() {
    this.modes = dom.segmented({
      label: "Mode",
      options: [
        { value: "generate", label: "Generate" },
        { value: "score", label: "Score prompt" },
      ],
      value: this.mode,
      onchange: (value) => this.#setMode(value),
    });
    return this.modes;
  }

  #colorRow() {
    const colors = dom.segmented({
      label: "Colour of the tokens",
      options: [
        { value: "probability", label: "Probability" },
        { value: "entropy", label: "Entropy" },
        { value: "none", label: "None" },
      ],
      value: this.coloring,
      onchange: (value) => {
        this.coloring = value;
        replace(this.legend, legend(value));
        for (const [choice] of this.views) this.#update(choice);
      },
    });
    return h(
      "div",
      { class: "toolbar" },
      h("div", { class: "row" }, h("span", { class: "secondary", text: "Colour" }), colors),
      this.legend,
    );
  }

  /**
   * @param {string} label
   * @param {string} what
   * @param {typeof curlCommand} write
   */
  #copyButton(label, what, write) {
    const onclick = () => {
      const body = this.#readBody();
      if (body) dom.copyText(write(this.api.address(""), body, this.api.hasKey()), what);
    };
    return button({ label, icon: "copy", kind: "quiet", small: true, onclick });
  }

  /** @param {string} mode */
  #setMode(mode) {
    this.mode = mode === "score" ? "score" : "generate";
    const label = this.mode === "score" ? "Score" : "Generate";
    this.startButton.querySelector(".button-label").textContent = label;
    this.modes.querySelector(`[value="${this.mode}"]`).checked = true;
  }

  /** Add a prompt beside the others and return its input. @param {string} text */
  #addColumn(text) {
    const input = h("textarea", {
      class: "textarea prompt-input", rows: 3, value: text, placeholder: "Enter a prompt",
      onkeydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#start();
      },
    });
    const title = h("label", { class: "prompt-title" });
    const remove = button({
      label: "Remove this prompt", icon: "close", iconOnly: true, kind: "quiet", small: true,
      onclick: () => {
        this.columns = this.columns.filter((other) => other !== column);
        column.element.remove();
        this.#nameColumns();
        this.columns.at(-1).input.focus();
      },
    });
    input.id = dom.uniqueId("prompt");
    title.htmlFor = input.id;
    const header = h("div", { class: "prompt-header" }, title, remove);
    const element = h("section", { class: "card prompt-card" }, header, input);
    const column = { element, input, title, remove };
    this.columns.push(column);
    this.grid.append(element);
    this.#nameColumns();
    return input;
  }

  #nameColumns() {
    const isOne = this.columns.length === 1;
    this.columns.forEach(({ title, remove, element }, index) => {
      title.textContent = isOne ? "Prompt" : `Prompt ${index + 1}`;
      element.setAttribute("aria-label", title.textContent);
      remove.hidden = isOne;
    });
    this.addButton.disabled = this.columns.length === MAX_PROMPTS;
  }

  /** Return the request without the fields about streaming, or null after showing an error. */
  #readBody() {
    const prompts = this.columns.map(({ input }) => input.value);
    this.#fail(null);
    const empty = prompts.indexOf("");
    if (empty >= 0) {
      this.#fail(prompts.length === 1 ? "Enter a prompt." : `Prompt ${empty + 1} is empty.`);
      this.columns[empty].input.focus();
      return null;
    }
    let fields;
    try {
      fields = this.settings.fields();
    } catch (error) {
      this.#fail(error.message);
      return null;
    }
    const prompt = prompts.length === 1 ? prompts[0] : prompts;
    const model = this.store.get("model");
    const common = { ...(model ? { model } : {}), prompt };
    if (this.mode === "generate") return { ...common, ...fields };
    const options = { echo: true, max_tokens: 0, return_token_ids: true };
    return { ...common, ...options, prompt_logprobs: fields.logprobs ?? 0 };
  }

  /** Show an error of the whole request, or none. @param {string | null} message */
  #fail(message) {
    replace(this.problem, message && dom.errorMessage(message));
    this.problem.hidden = !message;
  }

  #start() {
    const body = this.#readBody();
    if (!body) return;
    const prompts = this.columns.map(({ input }) => input.value);
    const numChoices = body.n ?? 1;
    const choices = prompts.flatMap((_, prompt) =>
      Array.from({ length: numChoices }, (__, index) => newChoice(prompt, index)),
    );
    const numAlternatives = body.logprobs ?? body.prompt_logprobs ?? 0;
    const values = this.settings.values();
    const run = { mode: this.mode, prompts, body, choices, settings: values, numAlternatives };
    this.#show({ ...run, note: "" });
    this.#send(body, choices);
  }

  /**
   * Continue a choice from its end, or from an alternative of one of its tokens.
   * @param {import("./generation.js").Choice} choice
   * @param {{position: number, id: number} | null} at
   */
  #branch(choice, at) {
    const { run } = this;
    let fields = { ...run.body };
    if (run.mode === "score") {
      this.#setMode("generate");
      fields = this.#readBody();
      if (!fields) return;
    }
    delete fields.n;
    const position = at?.position ?? choice.tokens.length - 1;
    const branch = branchAt(choice, position, at?.id ?? choice.tokens[position].id);
    if (!at) branch.tokens[position] = { ...choice.tokens[position], origin: "kept" };
    const prompt = allIds(branch);
    const room = (this.store.get("maxModelLen") ?? Infinity) - prompt.length;
    if (room < 1) {
      dom.toast("The text fills the model's context.", "error");
      return;
    }
    if (fields.max_tokens > room) fields.max_tokens = room;
    this.controller?.abort();
    const choices = run.choices.map((other) => (other === choice ? branch : other));
    const note = at ? `from ${this.vocabulary.label(at.id)}` : "continued";
    this.#show({ ...run, mode: "generate", body: fields, choices, note });
    this.#send({ ...fields, prompt }, [branch]);
  }

  /**
   * @param {Record<string, any>} body
   * @param {import("./generation.js").Choice[]} choices
   */
  async #send(body, choices) {
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    this.stopButton.disabled = false;
    const action = "echo" in body ? score : generate;
    const onchange = (/** @type {import("./generation.js").Choice} */ choice) => {
      if (!this.changed.size) requestAnimationFrame(() => this.#flush());
      this.changed.add(choice);
    };
    await action(this, body, choices, { signal: controller.signal, onchange });
    const failed = choices.find((choice) => choice.status === "failed");
    const count = choices.reduce((sum, choice) => sum + choice.tokens.length, 0);
    this.announce(failed ? failed.error : `Finished with ${count} tokens.`);
    if (this.controller === controller) {
      this.controller = null;
      this.stopButton.disabled = true;
    }
    this.#showHistory();
  }

  #flush() {
    const changed = [...this.changed];
    this.changed.clear();
    changed.forEach((choice) => this.#update(choice));
  }

  /** @param {import("./generation.js").Choice} choice */
  #update(choice) {
    const { run } = this;
    // The tokens of a scored prompt include the prompt.
    const isScored = !choice.promptIds.length && choice.tokens[0]?.origin === "prompt";
    this.views.get(choice)?.update(choice, {
      promptText: isScored || run.mode === "score" ? "" : run.prompts[choice.promptIndex],
      isScore: run.mode === "score",
      coloring: this.coloring,
      numAlternatives: run.numAlternatives,
    });
  }

  /** Show a run, and keep it in the history. @param {Run} run */
  #show(run) {
    dom.hideTooltip();
    this.run = run;
    this.history = [run, ...this.history.filter((other) => other !== run)].slice(0, MAX_RUNS);
    this.views.clear();
    this.hint.hidden = true;
    this.resultGrid.hidden = false;
    const cards = run.prompts.map((_, index) => {
      const label = run.prompts.length === 1 ? "Tokens" : `Tokens of prompt ${index + 1}`;
      const title = h("h3", { class: "result-title", text: label });
      return h("section", { class: "card prompt-card results", "aria-label": label }, title);
    });
    replace(this.resultGrid, cards);
    const perPrompt = run.choices.length / run.prompts.length;
    for (const choice of run.choices) {
      const card = cards[choice.promptIndex];
      const number = perPrompt > 1 ? `Choice ${choice.index + 1}` : null;
      const view = new ChoiceView({
        vocabulary: this.vocabulary,
        title: number,
        label: `${card.getAttribute("aria-label")}${number ? `, ${number.toLowerCase()}` : ""}`,
        onbranch: (position, id) => this.#branch(choice, { position, id }),
        onextend: () => this.#branch(choice, null),
        oninspect: (name, text) => {
          this.store.set("prompt", text);
          location.hash = name;
        },
      });
      this.views.set(choice, view);
      card.append(view.element);
      this.#update(choice);
    }
    this.#showHistory();
  }

  #showHistory() {
    let numTokens = 0;
    this.history = this.history.filter((run, index) => {
      numTokens += run.choices.reduce((sum, choice) => sum + choice.tokens.length, 0);
      return index === 0 || numTokens <= MAX_HISTORY_TOKENS;
    });
    replace(
      this.historyList,
      this.history.map((run) => {
        const count = run.choices.reduce((sum, choice) => sum + choice.tokens.length, 0);
        const what = [run.mode === "score" ? "score" : "generate", run.note, `${count} tokens`];
        return h(
          "li",
          {},
          h(
            "button",
            {
              type: "button", class: "history-item", "aria-current": run === this.run && "true",
              onclick: () => this.#restore(run),
            },
            h("span", { class: "history-prompt", text: run.prompts.join(" | ") }),
            h("span", { class: "history-what", text: what.filter(Boolean).join(" · ") }),
          ),
        );
      }),
      !this.history.length
        && h("li", { class: "secondary small-text", text: "Runs, until the page is closed." }),
    );
  }

  /** @param {Run} run */
  #restore(run) {
    this.controller?.abort();
    this.#setMode(run.mode);
    this.settings.restore(run.settings);
    this.columns.forEach(({ element }) => element.remove());
    this.columns = [];
    run.prompts.forEach((prompt) => this.#addColumn(prompt));
    this.#show(run);
  }
}
