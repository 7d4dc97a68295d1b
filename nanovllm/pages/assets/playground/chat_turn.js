/** One message of a chat: the user's text, or the tokens of an answer. */

import { draftsText, endText, isOpen } from "../client/generation.js";
import { button, copyText } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { tokenText } from "./token_text.js";

/**
 * @import { Choice } from "../client/generation.js"
 * @import { Vocabulary } from "../client/vocabulary.js"
 * @import { Turn } from "./chat.js"
 * @import { coloringControl } from "./coloring.js"
 * @typedef {ReturnType<typeof chatTurn>} ChatTurn
 */

/**
 * Return the view of a turn; an answer grows while it is generated.
 * @param {Turn} turn
 * @param {{vocabulary: Vocabulary, onedit: () => void, onretry: () => void,
 *   onbranch: (position: number, id: number) => void}} options
 */
export function chatTurn(turn, { vocabulary, onedit, onretry, onbranch }) {
  const { choice, numAlternatives } = turn;
  const quiet = /** @type {const} */ ({ kind: "quiet", small: true });
  const copied = () => copyText(choice?.text ?? turn.text, "message");
  const end = h("span", { class: "badge", hidden: !choice });
  const actions = h("div", { class: "row" }, [
    choice
      ? button("Retry", { icon: "reset", ...quiet }, onretry)
      : button("Edit", { ...quiet, title: "Write this message again" }, onedit),
    button("Copy", { icon: "copy", ...quiet }, copied),
  ]);
  const answer = choice && tokenText({ vocabulary, label: "Tokens of the answer", onbranch });
  const drafts = h("p", { class: "secondary small-text" });
  const name = choice ? "Model" : "You";
  const classes = `card stack chat-turn ${turn.role} choice`;
  const element = h("article", { class: classes, "aria-label": name }, [
    h("div", { class: "row between" }, [
      h("div", { class: "row" }, h("h3", { text: name }), end),
      actions,
    ]),
    answer ? [answer.element, drafts] : h("p", { class: "chat-text", text: turn.text }),
  ]);

  return {
    element,
    turn,
    /** Move the focus to a token of an answer. @param {number} position */
    focus: (position) => answer?.focus(position),
    /** Show the tokens since. @param {ReturnType<typeof coloringControl>} coloring */
    update(coloring) {
      if (!choice) return;
      const isRunning = isOpen(choice);
      element.classList.toggle("running", isRunning);
      actions.hidden = isRunning;
      replace(end, isRunning ? "answering" : endText(choice));
      const tokens = isRunning ? choice.tokens : answerTokens(choice, vocabulary);
      answer?.update({ tokens, promptText: "", coloring: coloring.value(choice), numAlternatives });
      drafts.textContent = draftsText(choice);
      drafts.hidden = !choice.hasDrafts;
    },
  };
}

/**
 * Return the tokens of an answer without those that belong to its stop string alone.
 * @param {Choice} choice
 * @param {Vocabulary} vocabulary
 */
function answerTokens({ tokens, text, stopReason }, vocabulary) {
  if (typeof stopReason !== "string") return tokens;
  const ids = tokens.map(({ id }) => id);
  while (ids.length && vocabulary.join(ids.slice(0, -1)).length >= text.length) ids.pop();
  return tokens.slice(0, ids.length);
}
