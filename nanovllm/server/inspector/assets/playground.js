/** The view "Playground": prompts side by side, generated or scored token by token. */

import { ChoiceView } from "./choice_view.js";
import { coloringControl } from "./coloring.js";
import { button, copyText, emptyState, toast } from "./components.js";
import { h, replace } from "./dom.js";
import { allIds, branchAt, generate, newChoice, score } from "./generation.js";
import { hideTooltip } from "./overlays.js";
import { PlaygroundForm } from "./playground_form.js";
import { RunHistory, countTokens } from "./run_history.js";
import { settingsCard } from "./settings_card.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { tourOffer } from "./tour.js";

const MAX_CHOICES = 128; // as in the API
const MAX_SEED = 2 ** 31; // of a seed that the page draws
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
 *   the request, which has a seed, and the kept tokens in its prompt where a choice is continued
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

/**
 * Return a request with a seed, so that the link of its run gives the same text. Scores need none.
 * @param {Record<string, any>} body
 */
function seeded(body) {
  return body.echo ? body : { seed: Math.floor(Math.random() * MAX_SEED), ...body };
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
  constructor(context) {
    this.api = context.api;
    this.shared = context.store;
    this.announce = context.announce;
    this.vocabulary = context.vocabulary;
    this.form = new PlaygroundForm(context);
    /** @type {Run | null} */
    this.run = null;
    this.history = new RunHistory({ onselect: (run) => this.#restore(run) });
    /** @type {Map<import("./generation.js").Choice, ChoiceView>} */
    this.views = new Map();
    /** @type {Set<import("./generation.js").Choice>} */
    this.changed = new Set();
    /** @type {AbortController | null} */
    this.controller = null;
    this.coloring = coloringControl({
      onchange: () => [...this.views.keys()].forEach((choice) => this.#update(choice)),
    });
    this.element = this.#build();
    const [last] = this.history.runs;
    if (last) this.vocabulary.load().then(() => this.run ?? this.#show(last), () => {});
    window.addEventListener("pagehide", () => this.history.save());
  }

  #build() {
    this.resultGrid = h("div", { class: "prompt-grid", hidden: true });
    this.hint = emptyState({
      title: "No tokens yet",
      text: "Generate continues the prompt. Each token then shows its probability, its rank and "
        + "its alternatives. Choose an alternative to continue from there.",
      action: h("div", { class: "stack tight" }, tourOffer(), questions()),
    });
    this.startButton = button({
      label: "Generate", icon: "play", kind: "primary", onclick: () => this.#start("generate"),
      title: "Ctrl+Enter", "aria-keyshortcuts": "Control+Enter",
    });
    const scoreButton = button({
      label: "Score prompt", onclick: () => this.#start("score"),
      title: "Show the probability of each token of the prompt; generate nothing",
    });
    this.stopButton = button({
      label: "Stop", icon: "stop", kind: "danger", onclick: () => this.controller?.abort(),
      disabled: true,
    });
    const composer = h(
      "section",
      { class: "card composer", "aria-label": "Prompt" },
      this.form.prompts.element,
      h(
        "div",
        { class: "row" },
        this.startButton, scoreButton, this.stopButton, this.form.prompts.addButton,
      ),
    );
    const copies = h(
      "div",
      { class: "row request-row" },
      h("span", { class: "secondary small-text", text: "This request" }),
      this.#copyButton("Copy as curl", "curl command", curlCommand),
      this.#copyButton("Copy as Python", "Python program", pythonProgram),
      button({
        label: "Copy link", icon: "copy", kind: "quiet", small: true,
        title: "A link that fills in these prompts and settings",
        onclick: () => this.#copyLink(),
      }),
    );
    return h(
      "div",
      {
        class: "playground",
        onkeydown: (/** @type {KeyboardEvent} */ event) => {
          if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
          event.preventDefault();
          this.#start("generate");
        },
      },
      h("h2", { class: "visually-hidden", text: "Playground" }),
      composer,
      settingsCard(this.form.settings.element),
      h("div", { class: "playground-results stack" }, this.form.problem, this.hint, this.resultGrid,
        copies),
      this.history.element,
    );
  }

  /** Return the prompts and settings of the shown run, unless the form has changed since. */
  #shownRun() {
    return this.run && this.form.text() === this.shownForm ? this.run : null;
  }

  #copyLink() {
    const link = this.form.link(this.#shownRun()?.sent.seed);
    if (link) copyText(link, "link");
    else toast("The prompts are too long for a link.", "error");
  }

  /**
   * @param {string} label
   * @param {string} what
   * @param {typeof curlCommand} write
   */
  #copyButton(label, what, write) {
    const onclick = async () => {
      const body = this.#shownRun()?.sent ?? (await this.form.fitted(this.form.read("generate")));
      if (body) copyText(write(this.api.address(""), body, this.api.hasKey()), what);
    };
    return button({ label, icon: "copy", kind: "quiet", small: true, onclick });
  }

  /** @param {Run["mode"]} mode */
  async #start(mode) {
    const read = this.form.read(mode);
    if (!read) return;
    const { prompts, settings } = this.form.values();
    const numChoices = mode === "generate" ? read.n ?? 1 : 1;
    if (numChoices > MAX_CHOICES) {
      this.form.fail(`Choices is ${numChoices}, but must be at most ${MAX_CHOICES}.`);
      return;
    }
    const controller = this.#begin();
    const body = await this.form.fitted(read, controller.signal);
    if (controller.signal.aborted) return;
    const choices = prompts.flatMap((_, prompt) =>
      Array.from({ length: numChoices }, (__, index) => newChoice(prompt, index)),
    );
    const numAlternatives = body.logprobs ?? body.prompt_logprobs ?? 0;
    const run = { mode, prompts, body, choices, settings, numAlternatives };
    const shown = this.run;
    const sent = seeded(body);
    this.#show({ ...run, sent, started: new Date(), note: "" });
    this.#send(controller, sent, choices, shown);
  }

  /**
   * Continue a choice from its end, or from an alternative of one of its tokens.
   * @param {import("./generation.js").Choice} choice
   * @param {{position: number, id: number} | null} at
   */
  #branch(choice, at) {
    const { run } = this;
    const fields = run.mode === "score" ? this.form.read("generate") : { ...run.body };
    if (!fields) return;
    delete fields.n;
    const position = at?.position ?? choice.tokens.length - 1;
    const branch = branchAt(choice, position, at?.id ?? choice.tokens[position].id);
    if (!at) branch.tokens[position] = { ...choice.tokens[position], origin: "kept" };
    const prompt = allIds(branch);
    const room = (this.shared.get("maxModelLen") ?? Infinity) - prompt.length;
    if (room < 1) {
      toast("The text fills the model's context.", "error");
      return;
    }
    fields.max_tokens = Math.min(fields.max_tokens ?? room, room);
    const choices = run.choices.map((other) => (other === choice ? branch : other));
    const note = at ? `from ${this.vocabulary.label(at.id)}` : "continued";
    const numAlternatives = Math.min(run.numAlternatives, fields.logprobs ?? 0);
    const sent = seeded({ ...fields, prompt });
    const changed = { body: fields, choices, numAlternatives, sent, started: new Date(), note };
    this.form.fail(null);
    const controller = this.#begin();
    this.#show({ ...run, mode: "generate", ...changed });
    this.views.get(branch).text.focus(position);
    this.#send(controller, sent, [branch], null);
  }

  /** Abort the last request, and return the controller of the next. */
  #begin() {
    this.controller?.abort();
    this.controller = new AbortController();
    this.stopButton.disabled = false;
    return this.controller;
  }

  /** @param {AbortController} controller */
  #end(controller) {
    if (this.controller !== controller) return;
    this.controller = null;
    if (document.activeElement === this.stopButton) this.startButton.focus();
    this.stopButton.disabled = true;
  }

  /**
   * @param {AbortController} controller
   * @param {Record<string, any>} body
   * @param {import("./generation.js").Choice[]} choices
   * @param {Run | null} shownBefore shown again if the request fails before its first token
   */
  async #send(controller, body, choices, shownBefore) {
    const { run } = this;
    const action = "echo" in body ? score : generate;
    const onchange = (/** @type {import("./generation.js").Choice} */ choice) => {
      if (!this.changed.size) requestAnimationFrame(() => this.#flush());
      this.changed.add(choice);
    };
    const error = await action(this, body, choices, { signal: controller.signal, onchange });
    this.announce(error ? error.message : `Finished with ${countTokens(choices)} tokens.`);
    if (this.controller === controller) {
      if (hasFailedEmpty(run) && shownBefore) this.#show(shownBefore);
      this.resultGrid.hidden = hasFailedEmpty(this.run);
      if (error) this.form.failRequest(error);
      this.#end(controller);
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
      coloring: this.coloring.value,
      numAlternatives: run.numAlternatives,
    });
  }

  /** Show a run; a new one goes into the history. @param {Run} run */
  #show(run) {
    hideTooltip();
    this.run = run;
    if (this.history.runs.includes(run)) this.history.show(run);
    else this.history.add(run);
    this.views.clear();
    this.hint.hidden = true;
    this.shownForm = this.form.text();
    this.resultGrid.hidden = hasFailedEmpty(run);
    const cards = run.prompts.map((_, index) => {
      const isOne = run.prompts.length === 1;
      const label = isOne ? "Tokens" : `Tokens of prompt ${index + 1}`;
      const title = h("h3", { class: isOne ? "visually-hidden" : "result-title", text: label });
      return h("section", { class: "card prompt-card results", "aria-label": label }, title);
    });
    replace(this.resultGrid, cards);
    const perPrompt = run.choices.length / run.prompts.length;
    run.choices.forEach((choice, index) => {
      const card = cards[choice.promptIndex];
      const number = perPrompt > 1 ? `Choice ${choice.index + 1}` : null;
      const view = new ChoiceView({
        vocabulary: this.vocabulary,
        title: number,
        label: `${card.getAttribute("aria-label")}${number ? `, ${number.toLowerCase()}` : ""}`,
        toolbar: index === 0 ? this.coloring.element : null,
        onbranch: (position, id) => this.#branch(choice, { position, id }),
        onextend: () => this.#branch(choice, null),
        onfollow: (request) => this.shared.set("engineRequest", request),
        oninspect: (name, text) => {
          this.shared.set("prompt", text);
          location.hash = name;
        },
      });
      this.views.set(choice, view);
      card.append(view.element);
      this.#update(choice);
    });
  }

  /** @param {Run} run */
  async #restore(run) {
    this.controller?.abort();
    this.form.restore(run);
    await this.vocabulary.load().catch(() => {}); // its tokens may be from before a reload
    this.#show(run);
    const { error } = run.choices.find((choice) => choice.status === "failed") ?? { error: null };
    this.form.fail(error && `This run failed: ${error}`);
  }
}
