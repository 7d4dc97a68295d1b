/** The view "Playground": prompts side by side, generated or scored token by token. */

import { ApiError } from "./api.js";
import { ChoiceView } from "./choice_view.js";
import { button, copyText, emptyState, errorMessage, segmented, toast } from "./components.js";
import { h, replace } from "./dom.js";
import { allIds, branchAt, generate, newChoice, score } from "./generation.js";
import { hideTooltip } from "./overlays.js";
import { PromptColumns } from "./prompt_columns.js";
import { RunHistory, countTokens } from "./run_history.js";
import { createSettings } from "./sampling_settings.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { legend } from "./token_text.js";
import { Vocabulary } from "./vocabulary.js";

const MAX_CHOICES = 128; // as in the API
const FIRST_PROMPT = "Once upon a time, there was a";
const QUESTIONS = [
  ["lens", "Where does the probability of a prompt collapse?"],
  ["attention", "Which head looks at the previous token?"],
  ["engine", "Why does a request wait?"],
  ["embeddings", "Which tokens are similar?"],
];

/**
 * @typedef {{mode: "generate" | "score", prompts: string[], body: Record<string, any>,
 *   choices: import("./generation.js").Choice[], settings: Record<string, any>,
 *   numAlternatives: number, sent: Record<string, any>, started: Date, note: string}} Run `sent` is
 *   the request, which has the kept tokens in its prompt where a choice is continued
 */

/** @param {import("./main.js").Context} context */
export function create(context) {
  const playground = new Playground(context);
  return { element: playground.element, show() {}, hide: hideTooltip };
}

/** Return whether a run failed before its first token. @param {Run} run */
function hasFailedEmpty({ choices }) {
  return choices.every((choice) => choice.status === "failed" && !choice.tokens.length);
}

/** Return links to the views that answer what a first visitor may ask. */
function questions() {
  return h(
    "ul",
    { class: "questions", "aria-label": "What the other views answer" },
    QUESTIONS.map(([view, text]) => h("li", {}, h("a", { href: `#${view}`, text }))),
  );
}

class Playground {
  /** @param {import("./main.js").Context} context */
  constructor({ api, store, announce }) {
    this.api = api;
    this.store = store;
    this.announce = announce;
    this.vocabulary = new Vocabulary(api);
    this.settings = createSettings();
    store.subscribe("samplingDefaults", (values) => this.settings.showDefaults(values ?? {}));
    this.prompts = new PromptColumns({ onsubmit: () => this.#start() });
    /** @type {Run | null} */
    this.run = null;
    this.history = new RunHistory({ onselect: (run) => this.#restore(run) });
    /** @type {Map<import("./generation.js").Choice, ChoiceView>} */
    this.views = new Map();
    /** @type {Set<import("./generation.js").Choice>} */
    this.changed = new Set();
    /** @type {AbortController | null} */
    this.controller = null;
    this.mode = /** @type {"generate" | "score"} */ ("generate");
    this.coloring = /** @type {import("./token_text.js").Coloring} */ ("probability");
    this.element = this.#build();
    this.prompts.replace([FIRST_PROMPT]);
    this.isOffline = false;
    this.store.subscribe("health", (health) => {
      if (this.isOffline && health !== "unreachable") this.#fail(null);
    });
  }

  #build() {
    this.resultGrid = h("div", { class: "prompt-grid", hidden: true });
    this.hint = emptyState({
      title: "No tokens yet",
      text: "Generate continues the prompt. Each token then shows its probability, its rank and its "
        + "alternatives. Choose an alternative to continue from there.",
      action: questions(),
    });
    this.problem = h("div", { hidden: true });
    this.legend = h("div", {}, legend(this.coloring));
    this.startButton = button({
      label: "Generate", icon: "play", kind: "primary", onclick: () => this.#start(),
      title: "Ctrl+Enter", "aria-keyshortcuts": "Control+Enter",
    });
    this.stopButton = button({
      label: "Stop", icon: "stop", kind: "danger", onclick: () => this.controller?.abort(),
      disabled: true,
    });
    return h(
      "div",
      { class: "playground" },
      h("h2", { class: "visually-hidden", text: "Playground" }),
      h(
        "div",
        { class: "playground-main stack" },
        this.prompts.element,
        h(
          "div",
          { class: "row between actions-row" },
          h(
            "div",
            { class: "row" },
            this.#modeControl(), this.startButton, this.stopButton, this.prompts.addButton,
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
        h(
          "section",
          { class: "card side-card" },
          h("h3", { text: "Settings" }),
          h("p", { class: "secondary small-text", text: "An empty field shows its default." }),
          this.settings.element,
        ),
        h("section", { class: "card side-card" }, h("h3", { text: "History" }),
          this.history.element),
      ),
    );
  }

  #modeControl() {
    this.modes = segmented({
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
    const colors = segmented({
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
      const isShown = this.run && this.#formText() === this.shownForm;
      const body = isShown ? this.run.sent : this.#readBody();
      if (body) copyText(write(this.api.address(""), body, this.api.hasKey()), what);
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

  /** Return the request without the fields about streaming, or null after showing an error. */
  #readBody() {
    const prompts = this.prompts.texts();
    this.#fail(null);
    const empty = prompts.indexOf("");
    if (empty >= 0) {
      this.#fail(prompts.length === 1 ? "Enter a prompt." : `Prompt ${empty + 1} is empty.`);
      this.prompts.focus(empty);
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

  /** Return what the prompts and settings are, to notice a change. */
  #formText() {
    return JSON.stringify([this.mode, this.prompts.texts(), this.settings.values()]);
  }

  /** Show an error of the whole request, or none. @param {string | null} message */
  #fail(message) {
    this.isOffline = false;
    replace(this.problem, message && errorMessage(message));
    this.problem.hidden = !message;
    if (message) this.problem.scrollIntoView({ block: "nearest" });
  }

  /** Show why a request failed. @param {Error} error */
  #failRequest(error) {
    this.#fail(error.message);
    if (!(error instanceof ApiError)) return;
    this.settings.mark(error.param);
    this.isOffline = error.status === 0;
    if (this.isOffline) this.store.set("health", "unreachable");
  }

  #start() {
    const body = this.#readBody();
    if (!body) return;
    const prompts = this.prompts.texts();
    const numChoices = body.n ?? 1;
    if (numChoices > MAX_CHOICES) {
      this.#fail(`Choices is ${numChoices}, but must be at most ${MAX_CHOICES}.`);
      return;
    }
    const choices = prompts.flatMap((_, prompt) =>
      Array.from({ length: numChoices }, (__, index) => newChoice(prompt, index)),
    );
    const numAlternatives = body.logprobs ?? body.prompt_logprobs ?? 0;
    const values = this.settings.values();
    const run = { mode: this.mode, prompts, body, choices, settings: values, numAlternatives };
    this.#show({ ...run, sent: body, started: new Date(), note: "" });
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
      toast("The text fills the model's context.", "error");
      return;
    }
    if (fields.max_tokens > room) fields.max_tokens = room;
    this.controller?.abort();
    const choices = run.choices.map((other) => (other === choice ? branch : other));
    const note = at ? `from ${this.vocabulary.label(at.id)}` : "continued";
    const numAlternatives = Math.min(run.numAlternatives, fields.logprobs ?? 0);
    const sent = { ...fields, prompt };
    const changed = { body: fields, choices, numAlternatives, sent, started: new Date(), note };
    this.#fail(null);
    this.#show({ ...run, mode: "generate", ...changed });
    this.#send(sent, [branch]);
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
    const error = await action(this, body, choices, { signal: controller.signal, onchange });
    this.announce(error ? error.message : `Finished with ${countTokens(choices)} tokens.`);
    if (this.controller === controller) {
      this.controller = null;
      this.resultGrid.hidden = hasFailedEmpty(this.run);
      if (error) this.#failRequest(error);
      this.stopButton.disabled = true;
    }
    this.history.update();
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
    hideTooltip();
    this.run = run;
    this.history.add(run);
    this.views.clear();
    this.hint.hidden = true;
    this.shownForm = this.#formText();
    this.resultGrid.hidden = hasFailedEmpty(run);
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
        onfollow: (request) => this.store.set("engineRequest", request),
        oninspect: (name, text) => {
          this.store.set("prompt", text);
          location.hash = name;
        },
      });
      this.views.set(choice, view);
      card.append(view.element);
      this.#update(choice);
    }
  }

  /** @param {Run} run */
  #restore(run) {
    this.controller?.abort();
    this.#setMode(run.mode);
    this.settings.restore(run.settings);
    this.prompts.replace(run.prompts);
    this.#show(run);
    const { error } = run.choices.find((choice) => choice.status === "failed") ?? { error: null };
    this.#fail(error && `This run failed: ${error}`);
  }
}
