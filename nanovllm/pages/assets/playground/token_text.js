/** Tokens as text: coloured, with a tooltip each, and a popover with the alternatives. */

import { probabilityColor } from "../charts/probability_chart.js";
import { entropyNats, rankText } from "../client/generation.js";
import { decode } from "../client/vocabulary.js";
import { button } from "../elements/components.js";
import { h, replace, rovingFocus, targetOf } from "../elements/dom.js";
import {
  escapeControls,
  escapedBytes,
  formatNumber,
  formatPercent,
  formatThings,
} from "../elements/format.js";
import { hideTooltip, openPopover, showTooltip } from "../elements/overlays.js";

/**
 * @import { Alternative, Token } from "../client/generation.js"
 * @import { Vocabulary } from "../client/vocabulary.js"
 * @typedef {"probability" | "entropy" | "drafts" | "none"} Coloring
 * @typedef {ReturnType<typeof tokenText>} TokenText
 */

/** Most entropy in nats of each colour, but the first, from low to high colour. */
const ENTROPY_STEPS = [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5];
const NUM_TOOLTIP_BARS = 5;

/**
 * Return the number of a token's colour in the sequential scale, or null.
 * @param {Token} token
 * @param {Coloring} coloring
 * @param {number} count number of alternatives that the request asked for
 */
function colorIndex(token, coloring, count) {
  if (coloring === "probability" && token.logprob !== null) {
    return probabilityColor(Math.exp(token.logprob));
  }
  const nats = coloring === "entropy" ? entropyNats(token, count) : null;
  return nats === null ? null : ENTROPY_STEPS.filter((step) => nats <= step).length;
}

/** Return the class of a token that had a draft, or null. @param {Token} token */
function draftClass({ id, draft }) {
  if (draft == null) return null;
  return id === draft ? "draft-accepted" : "draft-rejected";
}

/** Return the legend of a colouring. @param {Coloring} coloring */
export function legend(coloring) {
  if (coloring === "none") return h("div");
  if (coloring === "drafts") {
    return h("ul", { class: "row scale-legend secondary small-text" }, [
      h("li", { class: "draft-accepted", text: "accepted draft" }),
      h("li", { class: "draft-rejected", text: "another token was drafted" }),
      h("li", { text: "no draft" }),
    ]);
  }
  const isProbability = coloring === "probability";
  const title = isProbability ? "Probability of the token" : "Entropy, at least";
  const labels = isProbability
    ? ["< 0.1 %", "0.1", "1", "3", "10", "20", "40", "60", "≥ 90 %"]
    : ["> 4 nats", "4", "3.5", "3", "2.5", "2", "1.5", "1", "≤ 0.5 nats"];
  const steps = labels.map((text, index) => h("li", { class: `scale-step seq-${index}`, text }));
  return h("div", { class: "row scale-legend secondary small-text" }, [
    h("span", { class: "scale-title", text: title }),
    h("ol", { class: "scale-steps" }, steps),
  ]);
}

/**
 * Return the tokens of one choice.
 * @param {{vocabulary: Vocabulary, label: string, onbranch: (position: number, id: number) => void,
 *   onpoint?: (position: number | null) => void}} options
 */
export function tokenText({ vocabulary, label, onbranch, onpoint = () => {} }) {
  /** @type {Token[]} */
  let tokens = [];
  let numAlternatives = 0;
  /** @type {Coloring} */
  let coloring = "probability";
  /** Bytes of a character that is not complete yet. @type {number[]} */
  let openBytes = [];
  const prompt = h("span", { class: "prompt-text" });
  const list = h("span", { class: "tokens", role: "group", "aria-label": label });
  const element = h("div", { class: "token-text", dataset: { around: "" } }, prompt, list);

  /** @param {Token} token @param {number} position */
  function span(token, position) {
    const bytes = vocabulary.bytes(token.id);
    const text = decode(bytes);
    const color = colorIndex(token, coloring, numAlternatives);
    const draft = coloring === "drafts" ? draftClass(token) : null;
    const classes = ["token", color === null ? (draft ?? "plain") : `seq-${color}`];
    if (token.origin === "chosen") classes.push("chosen");
    if (text === null) classes.push("bytes");
    else if (text.includes("\n")) classes.push("newline");
    const chance = token.logprob === null ? "" : `, ${formatPercent(Math.exp(token.logprob))}`;
    const attributes = {
      class: classes.join(" "),
      role: "button",
      tabindex: "-1",
      dataset: { position },
      "aria-haspopup": "dialog",
      "aria-label": `${vocabulary.label(token.id)}${chance}${draft ? `, draft ${draftText(token)}` : ""}`,
    };
    if (text !== null) {
      openBytes = [];
      return h("span", { ...attributes, text: escapeControls(text) });
    }
    openBytes.push(...bytes);
    const character = decode(Uint8Array.from(openBytes));
    if (character !== null) openBytes = [];
    const values = h("span", { class: "byte-values", text: escapedBytes(bytes) });
    return h("span", attributes, values, character);
  }

  /** @param {number} position */
  const at = (position) => /** @type {HTMLElement | undefined} */ (list.children[position]);

  /** @param {Event} event */
  function find(event) {
    const found = targetOf(event).closest(".token");
    if (!(found instanceof HTMLElement)) return null;
    const position = Number(found.dataset.position);
    return tokens[position] && { anchor: found, position, token: tokens[position] };
  }

  /** @param {Event} event */
  function point(event) {
    const found = find(event);
    if (!found || found.anchor.hasAttribute("aria-expanded")) return;
    onpoint(found.position);
    const bars = found.token.alternatives
      .slice(0, NUM_TOOLTIP_BARS)
      .map((other) => h("li", {}, bar(found.token, other)));
    showTooltip(
      found.anchor,
      details(found.token),
      bars.length > 0 && h("ol", { class: "stack bars" }, bars),
    );
  }

  function leave() {
    hideTooltip();
    onpoint(null);
  }

  /** @param {Token} token */
  function draftText({ id, draft }) {
    return id === draft ? "accepted" : `${vocabulary.label(Number(draft))}, rejected`;
  }

  /** Return a token's figures, for a tooltip. @param {Token} token */
  function details(token) {
    const nats = entropyNats(token, numAlternatives);
    const facts = [["Token id", String(token.id)]];
    if (nats !== null) facts.unshift(["Entropy, at least", `${formatNumber(nats, 2)}\u202Fnats`]);
    if (token.logprob !== null) {
      facts.unshift(
        ["Probability", formatPercent(Math.exp(token.logprob))],
        ["Log-probability", `${formatNumber(token.logprob)}\u202Fnats`],
        ["Rank", rankText(token, numAlternatives)],
      );
    }
    if (draftClass(token)) facts.push(["Draft", draftText(token)]);
    const note = "The first token has no probability.";
    return h("div", { class: "stack tight" }, [
      h("code", { class: "token-name", text: vocabulary.label(token.id) }),
      token.logprob === null && h("p", { class: "secondary", text: note }),
      h("dl", { class: "facts" }, [
        facts.map(([name, value]) => [h("dt", { text: name }), h("dd", { text: value })]),
      ]),
    ]);
  }

  /** @param {Token} token @param {Alternative} other */
  function bar(token, other) {
    const probability = Math.exp(other.logprob);
    const vars = { "--share": probability.toFixed(4) };
    return h("span", { class: other.id === token.id ? "bar own" : "bar", vars }, [
      h("code", { class: "bar-name ellipsis", text: vocabulary.label(other.id) }),
      h("span", { text: formatPercent(probability) }),
    ]);
  }

  /** Open the alternatives of a token. @param {Event} event */
  function open(event) {
    const found = find(event);
    if (!found) return;
    const { anchor, position, token } = found;
    const count = token.alternatives.length;
    const choices = token.alternatives.map((other, index) => {
      const action = other.id === token.id ? "Generate again after" : "Continue with";
      const chance = formatPercent(Math.exp(other.logprob));
      const attributes = {
        class: "bare bar-button",
        "aria-label": `${action} ${vocabulary.label(other.id)}, ${chance}`,
        tabindex: index ? -1 : 0,
        onclick() {
          close();
          onbranch(position, other.id);
        },
      };
      return h("li", {}, h("button", attributes, bar(token, other)));
    });
    const title = count
      ? `Continue from one of ${formatThings(count, "token")}`
      : "No alternatives";
    const none = "The request asked for none: “Alternatives” in the settings is their number.";
    const bars = h("ol", { class: "stack bars choices" }, choices);
    rovingFocus(bars, ".bar-button");
    const close = openPopover({
      anchor,
      label: "Alternatives of the token",
      content: [
        details(token),
        h("h3", { class: "popover-title", text: title }),
        count ? bars : h("p", { class: "secondary", text: none }),
        h("div", { class: "row end" }, [
          button("Close", { kind: "quiet", small: true }, () => close()),
        ]),
      ],
    });
  }

  rovingFocus(list, ".token");
  for (const name of ["pointerover", "focusin"]) list.addEventListener(name, point);
  for (const name of ["pointerout", "focusout"]) list.addEventListener(name, leave);
  list.addEventListener("click", open);
  list.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    open(event);
  });

  return {
    element,
    details,
    /**
     * Show these tokens; only those after the ones that are shown are added to the page.
     * @param {{tokens: Token[], promptText: string, coloring: Coloring,
     *   numAlternatives: number}} shown
     */
    update(shown) {
      const isSame = coloring === shown.coloring && tokens === shown.tokens;
      prompt.textContent = shown.promptText;
      ({ coloring, tokens, numAlternatives } = shown);
      if (!isSame) {
        hideTooltip();
        replace(list);
        openBytes = [];
      }
      const numShown = list.childElementCount;
      list.append(...tokens.slice(numShown).map((token, index) => span(token, numShown + index)));
      if (!list.querySelector('[tabindex="0"]')) at(0)?.setAttribute("tabindex", "0");
    },
    /** Mark a token, as the chart points at it. @param {number | null} position */
    mark(position) {
      list.querySelector(".pointed")?.classList.remove("pointed");
      if (position !== null) at(position)?.classList.add("pointed");
    },
    /**
     * Move the focus to a token, without its tooltip if it stays where it is on the screen.
     * @param {number} position
     * @param {{isQuiet?: boolean}} [options]
     */
    focus(position, { isQuiet = true } = {}) {
      at(position)?.focus({ preventScroll: isQuiet });
      if (isQuiet) hideTooltip();
    },
  };
}
