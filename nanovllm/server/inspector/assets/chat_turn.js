/** One message of a chat: the user's text, or the tokens of an answer. */

import { button, copyText } from "./components.js";
import { h, replace } from "./dom.js";
import { endText } from "./generation.js";
import { TokenText } from "./token_text.js";

/** Shows a turn; an answer grows while it is generated. */
export class ChatTurn {
  /**
   * @param {import("./chat.js").Turn} turn
   * @param {{vocabulary: import("./vocabulary.js").Vocabulary, onedit: () => void,
   *   onretry: () => void, onbranch: (position: number, id: number) => void}} options
   */
  constructor(turn, { vocabulary, onedit, onretry, onbranch }) {
    this.turn = turn;
    this.vocabulary = vocabulary;
    const isUser = turn.role === "user";
    const quiet = /** @type {const} */ ({ kind: "quiet", small: true });
    this.end = h("span", { class: "badge" });
    this.actions = h(
      "div",
      { class: "row" },
      isUser
        ? button({ label: "Edit", ...quiet, title: "Write this message again", onclick: onedit })
        : button({ label: "Retry", icon: "reset", ...quiet, onclick: onretry }),
      button({ label: "Copy", icon: "copy", ...quiet,
        onclick: () => copyText(turn.choice?.text ?? turn.text, "message") }),
    );
    this.text = isUser
      ? null
      : new TokenText({ vocabulary, label: "Tokens of the answer", onbranch, onpoint() {} });
    const name = isUser ? "You" : "Model";
    const header = h("h3", { text: name });
    this.element = h(
      "article",
      { class: `card chat-turn ${turn.role} choice`, "aria-label": name },
      h("div", { class: "row between" }, h("div", { class: "row" }, header, this.end),
        this.actions),
      this.text ? this.text.element : h("p", { class: "chat-text", text: turn.text }),
    );
  }

  /** Show the tokens that have come since. @param {import("./token_text.js").Coloring} coloring */
  update(coloring) {
    const { choice, numAlternatives } = this.turn;
    this.end.hidden = !choice;
    if (!choice) return;
    const isRunning = choice.status === "running" || choice.status === "waiting";
    this.element.classList.toggle("running", isRunning);
    this.actions.hidden = isRunning;
    replace(this.end, isRunning ? "answering" : endText(choice));
    const tokens = isRunning ? choice.tokens : answerTokens(choice, this.vocabulary);
    this.text.update({ tokens, promptText: "", coloring, numAlternatives });
  }
}

/**
 * Return the tokens of an answer without those that belong to its stop string alone.
 * @param {import("./generation.js").Choice} choice
 * @param {import("./vocabulary.js").Vocabulary} vocabulary
 */
function answerTokens({ tokens, text, stopReason }, vocabulary) {
  if (typeof stopReason !== "string") return tokens;
  const ids = tokens.map((token) => token.id);
  while (ids.length && vocabulary.join(ids.slice(0, -1)).length >= text.length) ids.pop();
  return tokens.slice(0, ids.length);
}
