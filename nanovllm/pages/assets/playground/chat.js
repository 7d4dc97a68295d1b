/** The view "Chat": a conversation, whose answers are coloured token by token. */

import { oncePerFrame } from "../charts/canvas.js";
import { branchAt, ended, generate, newChoice } from "../client/generation.js";
import { fitMaxTokens } from "../client/lengths.js";
import { button, emptyState, field } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { hideTooltip } from "../elements/overlays.js";
import { forget, load, MAX_CHARACTERS, store as save, write } from "../elements/saved.js";
import { chatTurn } from "./chat_turn.js";
import { coloringControl } from "./coloring.js";
import { problemBox } from "./problem_box.js";
import { samplingSettings } from "./sampling_settings.js";
import { stopControl } from "./stop_control.js";

/**
 * @import { Choice } from "../client/generation.js"
 * @import { ChatTurn } from "./chat_turn.js"
 * @typedef {{role: "user" | "assistant", text: string, choice: Choice | null,
 *   numAlternatives: number}} Turn `choice` of an answer
 */

const NAME = "chat";
const END_PX = 60; // from the end of the page, within which it follows an answer
const SKIPPED = ["n", "truncate_prompt_tokens"]; // one answer; the server keeps the whole chat
const COMMAND = "nanovllm serve MODEL --chat-template plain";

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function chatView(context) {
  const { api, store, announce, vocabulary } = context;
  /** @type {Turn[]} */
  let turns = [];
  /** @type {ChatTurn[]} */
  let views = [];
  const coloring = coloringControl({ onchange: update });
  const problem = problemBox();
  const stop = stopControl({ focusAfter: () => input });
  const system = h("textarea", { class: "textarea", rows: 2, name: "system", placeholder: "none" });
  const settings = samplingSettings(store, {
    skipped: SKIPPED,
    before: h(
      "div",
      { class: "system-field" },
      field({ label: "System message", control: system }),
    ),
  });
  const log = h("section", { class: "chat-log stack", "aria-label": "Conversation" });
  const hint = emptyState({
    title: "No messages yet",
    text:
      "The model answers in the form of its chat template. Models that were not trained on " +
      "conversations answer as a book would.",
  });
  const input = h("textarea", {
    class: "textarea prompt-input",
    rows: 2,
    name: "message",
    placeholder: "Enter a message",
    onkeydown: sendByKey,
  });
  const sendButton = button(
    "Send",
    {
      icon: "up",
      kind: "primary",
      title: "Enter; Shift+Enter is a new line",
      "aria-keyshortcuts": "Enter",
    },
    send,
  );
  const clearButton = button("New chat", { kind: "quiet" }, clear);
  const composer = h("section", { class: "card stack composer", "aria-label": "Message" }, [
    field({ label: "Message", control: input, hideLabel: true }),
    h("div", { class: "row" }, sendButton, stop.button, clearButton),
  ]);
  const main = [coloring.element, log, hint, problem.element, composer];
  const talk = h("div", { class: "playground" }, [
    h("div", { class: "chat-main stack" }, main),
    settings.element,
  ]);
  const missing = emptyState({
    title: "This model has no chat template",
    text:
      "A chat template turns a conversation into a prompt. Start the server with one; plain works " +
      "with every model:",
    action: h("pre", { class: "mono command", text: COMMAND }),
  });
  const title = h("h2", { class: "visually-hidden", text: "Chat" });
  const element = h("div", {}, title, missing, talk);
  const drawSoon = oncePerFrame(draw);

  /** Keep the last turns, as many as the browser has room for. */
  function keep() {
    const text = write({ turns, system: system.value, settings: settings.values() });
    if (text.length <= MAX_CHARACTERS) save(NAME, text);
    else forget(NAME);
  }

  function clear() {
    rewind(0);
    show();
    problem.show(null);
    input.focus();
  }

  /** Drop the turns from this one on. @param {number} index */
  function rewind(index) {
    stop.abort();
    stop.end();
    turns = turns.slice(0, index);
  }

  /** @param {KeyboardEvent} event */
  function sendByKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  }

  /** Send the message of the form. */
  function send() {
    const text = input.value;
    if (!text.trim() || stop.isBusy()) return;
    input.value = "";
    turns.push({ role: "user", text, choice: null, numAlternatives: 0 });
    show();
    answer(newChoice(0, 0));
  }

  /**
   * Ask for an answer to the turns, or for the rest of one whose first tokens are kept.
   * @param {Choice} choice
   */
  async function answer(choice) {
    const signal = stop.begin();
    problem.show(null);
    try {
      const body = await readBody(choice, signal);
      signal.throwIfAborted();
      const numAlternatives = body.top_logprobs ?? 0;
      turns.push({ role: "assistant", text: "", choice, numAlternatives });
      show();
      if (choice.tokens.length) views.at(-1)?.focus(choice.tokens.length - 1);
      const error = await generate(context, body, [choice], { signal, onchange: drawSoon });
      if (!stop.isCurrent(signal)) return;
      if (error && !choice.tokens.length) turns.pop();
      announce(error ? error.message : `Answer: ${choice.text}`);
      if (error) throw error;
    } catch (/** @type {any} */ error) {
      if (!stop.isCurrent(signal)) return;
      if (!signal.aborted) fail(/** @type {any} */ (error));
    }
    stop.end();
    show();
  }

  /** @param {Error & {param?: string | null}} error */
  function fail({ message, param = null }) {
    problem.show(message);
    settings.mark(param);
  }

  /**
   * Return the request for an answer; throws where a setting cannot be read.
   * @param {Choice} choice whose tokens are kept
   * @param {AbortSignal} signal
   */
  async function readBody(choice, signal) {
    const { logprobs: count, max_tokens: wanted, ...fields } = settings.fields();
    const messages = turns.map(({ role, text, choice: answered }) => ({
      role: /** @type {string} */ (role),
      content: answered?.text ?? text,
    }));
    if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
    const isKept = choice.tokens.length > 0;
    if (isKept) messages.push({ role: "assistant", content: choice.text });
    const ending = { continue_final_message: isKept, add_generation_prompt: !isKept };
    const server = { api, maxModelLen: store.get("maxModelLen") };
    const lengths = { wanted };
    const maxTokens = await fitMaxTokens(server, [{ messages, ...ending }], lengths, { signal });
    const model = store.get("model");
    return {
      ...(model ? { model } : {}),
      messages,
      ...(isKept ? ending : {}),
      ...fields,
      ...(count === undefined ? {} : { logprobs: true, top_logprobs: count }),
      max_tokens: maxTokens,
    };
  }

  function draw() {
    const page = document.documentElement;
    const isAtEnd = innerHeight + scrollY >= page.scrollHeight - END_PX;
    views.at(-1)?.update(coloring);
    if (isAtEnd) scrollTo(0, page.scrollHeight);
  }

  function update() {
    for (const view of views) view.update(coloring);
  }

  /** Show the turns; those that are shown keep their elements. */
  function show() {
    hideTooltip();
    views = turns.map((turn) => views.find((view) => view.turn === turn) ?? viewOf(turn));
    const elements = views.map((view) => view.element);
    const isSame =
      elements.length === log.childElementCount &&
      elements.every((each, index) => each === log.children[index]);
    if (!isSame) replace(log, elements); // which would lose the focus
    hint.hidden = turns.length > 0;
    coloring.element.hidden = !turns.length;
    clearButton.hidden = !turns.length;
    update();
    log.lastElementChild?.scrollIntoView({ block: "nearest" });
  }

  /** @param {Turn} turn */
  function viewOf(turn) {
    const drop = () => rewind(turns.indexOf(turn));
    return chatTurn(turn, {
      vocabulary,
      onedit() {
        drop();
        show();
        input.value = turn.text;
        input.focus();
      },
      onretry() {
        drop();
        answer(newChoice(0, 0));
        input.focus();
      },
      onbranch(position, id) {
        drop();
        const branch = branchAt(/** @type {Choice} */ (turn.choice), position, id);
        branch.text = vocabulary.join(branch.tokens.map((token) => token.id));
        answer(branch);
      },
    });
  }

  coloring.element.hidden = true;
  clearButton.hidden = true;
  store.subscribe("hasChatTemplate", (has) => {
    missing.hidden = has !== false;
    talk.hidden = has === false;
  });
  load(NAME, (kept) => {
    settings.restore(kept.settings);
    system.value = String(kept.system);
    turns = kept.turns.map((/** @type {Turn} */ turn) => ({
      ...turn,
      choice: turn.choice && ended(turn.choice),
    }));
  });
  if (turns.length) vocabulary.load().then(show, () => {});
  window.addEventListener("pagehide", keep);
  return { element, hide: hideTooltip };
}
