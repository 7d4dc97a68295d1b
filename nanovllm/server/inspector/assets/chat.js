/** The view "Chat": a conversation, whose answers are coloured token by token. */

import { ChatTurn } from "./chat_turn.js";
import { coloringControl } from "./coloring.js";
import { button, emptyState, errorMessage, field } from "./components.js";
import { h, replace } from "./dom.js";
import { branchAt, generate, newChoice } from "./generation.js";
import { fitMaxTokens } from "./lengths.js";
import { hideTooltip } from "./overlays.js";
import { createSettings } from "./sampling_settings.js";
import { MAX_CHARACTERS, ended, forget, load, store, write } from "./saved.js";
import { settingsCard } from "./settings_card.js";

const NAME = "chat";
const END_PX = 60; // from the end of the page, within which it follows an answer
const SKIPPED = ["n", "truncate_prompt_tokens"]; // one answer; the server keeps the whole chat
const COMMAND = "nanovllm serve MODEL --chat-template plain";

/**
 * @typedef {{role: "user" | "assistant", text: string,
 *   choice: import("./generation.js").Choice | null, numAlternatives: number}} Turn `choice` of an
 *   answer
 */

/** @param {import("./main.js").Context} context */
export function create(context) {
  const chat = new Chat(context);
  return { element: chat.element, show() {}, hide: hideTooltip };
}

class Chat {
  /** @param {import("./main.js").Context} context */
  constructor({ api, store: shared, announce, vocabulary }) {
    this.api = api;
    this.shared = shared;
    this.announce = announce;
    this.vocabulary = vocabulary;
    this.settings = createSettings({ skipped: SKIPPED });
    shared.subscribe("samplingDefaults", (values) => this.settings.showDefaults(values ?? {}));
    /** @type {Turn[]} */
    this.turns = [];
    /** @type {ChatTurn[]} */
    this.views = [];
    /** @type {AbortController | null} */
    this.controller = null;
    this.isDrawing = false;
    this.coloring = coloringControl({ onchange: () => this.#update() });
    this.element = this.#build();
    shared.subscribe("hasChatTemplate", (has) => {
      this.missing.hidden = has !== false;
      this.talk.hidden = has === false;
    });
    this.#restore();
    window.addEventListener("pagehide", () => this.#save());
  }

  #build() {
    this.missing = emptyState({
      title: "This model has no chat template",
      text: "A chat template turns a conversation into a prompt. Start the server with one; plain "
        + "works with every model:",
      action: h("pre", { class: "mono command", text: COMMAND }),
    });
    this.log = h("section", { class: "chat-log stack", "aria-label": "Conversation" });
    this.hint = emptyState({
      title: "No messages yet",
      text: "The model answers in the form of its chat template. Models that were not trained on "
        + "conversations answer as a book would.",
    });
    this.problem = h("div", { hidden: true });
    this.input = h("textarea", {
      class: "textarea prompt-input", rows: 2, name: "message", placeholder: "Enter a message",
    });
    this.system = h("textarea", { class: "textarea", rows: 2, name: "system",
      placeholder: "none" });
    this.sendButton = button({
      label: "Send", icon: "up", kind: "primary", onclick: () => this.#send(),
      title: "Enter; Shift+Enter is a new line", "aria-keyshortcuts": "Enter",
    });
    this.stopButton = button({
      label: "Stop", icon: "stop", kind: "danger", disabled: true,
      onclick: () => this.controller?.abort(),
    });
    this.clearButton = button({ label: "New chat", kind: "quiet", onclick: () => this.#clear() });
    this.input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    const composer = h(
      "section",
      { class: "card composer", "aria-label": "Message" },
      field({ label: "Message", control: this.input, hideLabel: true }),
      h("div", { class: "row" }, this.sendButton, this.stopButton, this.clearButton),
    );
    this.talk = h(
      "div",
      { class: "playground" },
      h("div", { class: "chat-main stack" }, this.coloring.element, this.log, this.hint,
        this.problem, composer),
      settingsCard(
        h("div", { class: "system-field" }, field({ label: "System message",
          control: this.system })),
        this.settings.element,
      ),
    );
    this.coloring.element.hidden = true;
    const title = h("h2", { class: "visually-hidden", text: "Chat" });
    return h("div", { class: "chat" }, title, this.missing, this.talk);
  }

  #restore() {
    load(NAME, ({ turns, system, settings }) => {
      this.settings.restore(settings);
      this.system.value = String(system);
      this.turns = turns.map((/** @type {Turn} */ turn) =>
        ({ ...turn, choice: turn.choice && ended(turn.choice) }));
    });
    if (this.turns.length) this.vocabulary.load().then(() => this.#show(), () => {});
  }

  /** Keep the last turns, as many as the browser has room for. */
  #save() {
    const text = write({
      turns: this.turns, system: this.system.value, settings: this.settings.values(),
    });
    if (text.length <= MAX_CHARACTERS) store(NAME, text);
    else forget(NAME);
  }

  #clear() {
    this.#rewind(0);
    this.#show();
    this.#fail(null);
    this.input.focus();
  }

  /** Drop the turns from this one on. @param {number} index */
  #rewind(index) {
    this.controller?.abort();
    this.#end();
    this.turns = this.turns.slice(0, index);
  }

  /** Send the message of the form. */
  #send() {
    const text = this.input.value;
    if (!text.trim() || this.controller) return;
    this.input.value = "";
    this.turns.push({ role: "user", text, choice: null, numAlternatives: 0 });
    this.#show();
    this.#answer(newChoice(0, 0));
  }

  /**
   * Ask for an answer to the turns, or for the rest of one whose first tokens are kept.
   * @param {import("./generation.js").Choice} choice
   */
  async #answer(choice) {
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    this.#fail(null);
    let body;
    try {
      body = await this.#body(choice, controller.signal);
    } catch (error) {
      if (this.controller !== controller) return;
      this.#end();
      this.#show();
      if (!controller.signal.aborted) this.#fail(error.message);
      return;
    }
    if (controller.signal.aborted) return;
    const numAlternatives = body.top_logprobs ?? 0;
    this.turns.push({ role: "assistant", text: "", choice, numAlternatives });
    this.#show();
    if (choice.tokens.length) this.views.at(-1).text.focus(choice.tokens.length - 1);
    this.stopButton.disabled = false;
    const error = await generate(this, body, [choice], {
      signal: controller.signal, onchange: () => this.#drawSoon(),
    });
    if (this.controller !== controller) return;
    this.#end();
    if (error && !choice.tokens.length) this.turns.pop();
    this.#show();
    if (error) {
      this.#fail(error.message);
      this.settings.mark(error.param ?? null);
    }
    this.announce(error ? error.message : `Answer: ${choice.text}`);
  }

  #end() {
    this.controller = null;
    if (document.activeElement === this.stopButton) this.input.focus();
    this.stopButton.disabled = true;
  }

  /**
   * Return the request for an answer; throws where a setting cannot be read.
   * @param {import("./generation.js").Choice} choice whose tokens are kept
   * @param {AbortSignal} signal
   */
  async #body(choice, signal) {
    const { logprobs: count, max_tokens: wanted, ...fields } = this.settings.fields();
    const messages = this.turns.map(({ role, text, choice: answer }) =>
      ({ role, content: answer?.text ?? text }));
    if (this.system.value.trim()) messages.unshift({ role: "system", content: this.system.value });
    const kept = choice.tokens.length > 0;
    if (kept) messages.push({ role: "assistant", content: choice.text });
    const ending = kept ? { continue_final_message: true, add_generation_prompt: false } : {};
    const server = { api: this.api, maxModelLen: this.shared.get("maxModelLen") };
    const input = { messages, add_generation_prompt: !kept, continue_final_message: kept };
    const maxTokens = await fitMaxTokens(server, [input], { wanted }, { signal });
    const model = this.shared.get("model");
    const top = count === undefined ? {} : { logprobs: true, top_logprobs: count };
    return { ...(model ? { model } : {}), messages, ...ending, ...fields, ...top,
      max_tokens: maxTokens };
  }

  /** @param {string | null} message */
  #fail(message) {
    replace(this.problem, message && errorMessage(message));
    this.problem.hidden = !message;
  }

  #drawSoon() {
    if (this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame(() => {
      this.isDrawing = false;
      const page = document.documentElement;
      const isAtEnd = innerHeight + scrollY >= page.scrollHeight - END_PX;
      this.views.at(-1)?.update(this.coloring.value);
      if (isAtEnd) scrollTo(0, page.scrollHeight);
    });
  }

  #update() {
    for (const view of this.views) view.update(this.coloring.value);
  }

  /** Show the turns; those that are shown keep their elements. */
  #show() {
    hideTooltip();
    this.views = this.turns.map((turn) =>
      this.views.find((view) => view.turn === turn) ?? this.#view(turn));
    const elements = this.views.map(({ element }) => element);
    const isSame = elements.length === this.log.childElementCount
      && elements.every((element, index) => element === this.log.children[index]);
    if (!isSame) replace(this.log, elements); // which would lose the focus
    this.hint.hidden = this.turns.length > 0;
    this.coloring.element.hidden = !this.turns.length;
    this.clearButton.hidden = !this.turns.length;
    this.#update();
    if (this.turns.length) this.log.lastElementChild.scrollIntoView({ block: "nearest" });
  }

  /** @param {Turn} turn */
  #view(turn) {
    const rewind = () => this.#rewind(this.turns.indexOf(turn));
    return new ChatTurn(turn, {
      vocabulary: this.vocabulary,
      onedit: () => {
        rewind();
        this.#show();
        this.input.value = turn.text;
        this.input.focus();
      },
      onretry: () => {
        rewind();
        this.#answer(newChoice(0, 0));
        this.input.focus();
      },
      onbranch: async (position, id) => {
        rewind();
        const branch = branchAt(turn.choice, position, id);
        branch.text = this.vocabulary.join(branch.tokens.map((token) => token.id));
        await this.#answer(branch);
      },
    });
  }
}
