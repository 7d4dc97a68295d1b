/**
 * Tokens as text: coloured, with a tooltip each, and a popover with the alternatives.
 *
 * @typedef {import("./generation.js").Token} Token
 * @typedef {"probability" | "entropy" | "none"} Coloring
 */

import { button } from "./components.js";
import { h, replace, rovingFocus } from "./dom.js";
import { escapeControls, escapedBytes, formatNumber, formatPercent } from "./format.js";
import { entropyNats, rankText } from "./generation.js";
import { hideTooltip, openPopover, showTooltip } from "./overlays.js";
import { decode } from "./vocabulary.js";

/** Least probability of each colour of the sequential scale, but the first. */
const PROBABILITY_STEPS = [0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.9];
/** Most entropy in nats of each colour, but the first, from low to high colour. */
const ENTROPY_STEPS = [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5];

/**
 * Return the number of a token's colour in the sequential scale, or null.
 * @param {Token} token
 * @param {Coloring} coloring
 * @param {number} [count] number of alternatives that the request asked for
 */
export function colorIndex(token, coloring, count = 0) {
  if (coloring === "probability" && token.logprob !== null) {
    const probability = Math.exp(token.logprob);
    return PROBABILITY_STEPS.filter((step) => probability >= step).length;
  }
  const nats = coloring === "entropy" ? entropyNats(token, count) : null;
  return nats === null ? null : ENTROPY_STEPS.filter((step) => nats <= step).length;
}

/** Return the legend of a colouring. @param {Coloring} coloring */
export function legend(coloring) {
  if (coloring === "none") return h("div");
  const isProbability = coloring === "probability";
  const labels = isProbability
    ? ["< 0.1 %", "0.1", "1", "3", "10", "20", "40", "60", "≥ 90 %"]
    : ["> 4 nats", "4", "3.5", "3", "2.5", "2", "1.5", "1", "≤ 0.5 nats"];
  return h(
    "div",
    { class: "scale-legend" },
    h("span", {
      class: "scale-title",
      text: isProbability ? "Probability of the token" : "Entropy, at least",
    }),
    h(
      "ol",
      { class: "scale-steps" },
      labels.map((label, index) => h("li", { class: `scale-step seq-${index}`, text: label })),
    ),
  );
}

/** The tokens of one choice. */
export class TokenText {
  /**
   * @param {{vocabulary: import("./vocabulary.js").Vocabulary, label: string,
   *   onbranch: (position: number, id: number) => void,
   *   onpoint: (position: number | null) => void}} options
   */
  constructor({ vocabulary, label, onbranch, onpoint }) {
    this.vocabulary = vocabulary;
    this.onbranch = onbranch;
    this.onpoint = onpoint;
    /** @type {Token[]} */
    this.tokens = [];
    this.numAlternatives = 0;
    /** @type {Coloring} */
    this.coloring = "probability";
    /** Bytes of a character that is not complete yet. @type {number[]} */
    this.openBytes = [];
    this.prompt = h("span", { class: "prompt-text" });
    this.list = h("span", { class: "tokens", role: "group", "aria-label": label });
    this.element = h(
      "div", { class: "token-text", dataset: { around: "" } }, this.prompt, this.list,
    );
    rovingFocus(this.list, ".token");
    for (const event of ["pointerover", "focusin"]) {
      this.list.addEventListener(event, (/** @type {Event} */ at) => this.#point(at.target));
    }
    for (const event of ["pointerout", "focusout"]) {
      this.list.addEventListener(event, () => this.#leave());
    }
    this.list.addEventListener("click", (/** @type {Event} */ at) => this.#open(at.target));
    this.list.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.#open(event.target);
    });
  }

  /**
   * Show these tokens; only those after the ones that are shown are added to the page.
   * @param {{tokens: Token[], promptText: string, coloring: Coloring,
   *   numAlternatives: number}} shown
   */
  update({ tokens, promptText, coloring, numAlternatives }) {
    const isSame = coloring === this.coloring && this.tokens === tokens;
    this.prompt.textContent = promptText;
    this.coloring = coloring;
    this.tokens = tokens;
    this.numAlternatives = numAlternatives;
    if (!isSame) {
      hideTooltip();
      replace(this.list);
      this.openBytes = [];
    }
    const fragment = document.createDocumentFragment();
    for (let index = this.list.childElementCount; index < tokens.length; index += 1) {
      fragment.append(this.#span(tokens[index], index));
    }
    this.list.append(fragment);
    if (this.list.firstElementChild && !this.list.querySelector('[tabindex="0"]')) {
      this.list.firstElementChild.tabIndex = 0;
    }
  }

  /** Mark a token, as the chart points at it. @param {number | null} position */
  mark(position) {
    this.list.querySelector(".pointed")?.classList.remove("pointed");
    if (position !== null) this.list.children[position]?.classList.add("pointed");
  }

  /** Move the focus to a token, without its tooltip. @param {number} position */
  focus(position) {
    this.at(position)?.focus({ preventScroll: true });
    hideTooltip();
  }

  /** Return the element of a token. @param {number} position */
  at(position) {
    return /** @type {HTMLElement} */ (this.list.children[position]);
  }

  /**
   * @param {Token} token
   * @param {number} position
   */
  #span(token, position) {
    const bytes = this.vocabulary.bytes(token.id);
    const text = decode(bytes);
    const color = colorIndex(token, this.coloring, this.numAlternatives);
    const classes = ["token", color === null ? "plain" : `seq-${color}`];
    if (token.origin === "chosen") classes.push("chosen");
    const chance = token.logprob === null ? "" : `, ${formatPercent(Math.exp(token.logprob))}`;
    const attributes = {
      role: "button",
      tabindex: "-1",
      dataset: { position },
      "aria-haspopup": "dialog",
      "aria-label": `${this.vocabulary.label(token.id)}${chance}`,
    };
    if (text !== null) {
      this.openBytes = [];
      if (text.includes("\n")) classes.push("newline");
      return h("span", { class: classes.join(" "), ...attributes, text: escapeControls(text) });
    }
    this.openBytes.push(...bytes);
    const character = decode(Uint8Array.from(this.openBytes));
    if (character !== null) this.openBytes = [];
    classes.push("bytes");
    return h(
      "span",
      { class: classes.join(" "), ...attributes },
      h("span", { class: "byte-values", text: escapedBytes(bytes) }),
      character,
    );
  }

  /** @param {EventTarget | null} target */
  #find(target) {
    const element = /** @type {Element} */ (target).closest?.(".token");
    if (!(element instanceof HTMLElement)) return null;
    const position = Number(element.dataset.position);
    return { element, position, token: this.tokens[position] };
  }

  /** @param {EventTarget | null} target */
  #point(target) {
    const found = this.#find(target);
    if (!found?.token || found.element.hasAttribute("aria-expanded")) return;
    this.onpoint(found.position);
    showTooltip(found.element, this.details(found.token), this.#bars(found.token, 5));
  }

  #leave() {
    hideTooltip();
    this.onpoint(null);
  }

  /** Return a token's figures, for a tooltip. @param {Token} token */
  details(token) {
    const nats = entropyNats(token, this.numAlternatives);
    const has = token.logprob !== null;
    const facts = [
      has && ["Probability", formatPercent(Math.exp(token.logprob))],
      has && ["Log-probability", `${formatNumber(token.logprob)}\u202Fnats`],
      has && ["Rank", rankText(token, this.numAlternatives)],
      nats !== null && ["Entropy, at least", `${formatNumber(nats, 2)}\u202Fnats`],
      ["Token id", String(token.id)],
    ].filter(Boolean);
    return h(
      "div",
      { class: "stack tight" },
      h("code", { class: "token-name", text: this.vocabulary.label(token.id) }),
      !has && h("p", { class: "secondary", text: "The first token has no probability." }),
      h(
        "dl",
        { class: "facts" },
        facts.map(([name, value]) => [h("dt", { text: name }), h("dd", { text: value })]),
      ),
    );
  }

  /**
   * @param {Token} token
   * @param {number} most
   */
  #bars(token, most) {
    if (!token.alternatives.length) return null;
    const shown = token.alternatives.slice(0, most);
    return h(
      "ol",
      { class: "bars" },
      shown.map((other) => h("li", {}, this.#bar(other, other.id === token.id))),
    );
  }

  /**
   * @param {import("./generation.js").Alternative} other
   * @param {boolean} isOwn
   */
  #bar(other, isOwn) {
    const probability = Math.exp(other.logprob);
    return h(
      "span",
      { class: isOwn ? "bar own" : "bar", vars: { "--share": probability.toFixed(4) } },
      h("code", { class: "bar-name", text: this.vocabulary.label(other.id) }),
      h("span", { class: "bar-value", text: formatPercent(probability) }),
    );
  }

  /** @param {EventTarget | null} target */
  #open(target) {
    const found = this.#find(target);
    if (!found?.token) return;
    const { element, position, token } = found;
    const count = token.alternatives.length;
    const list = h(
      "ol",
      { class: "bars choices" },
      token.alternatives.map((other) => h("li", {}, this.#choice(token, other, (id) => {
        close();
        this.onbranch(position, id);
      }))),
    );
    rovingFocus(list, ".bar-button");
    const close = openPopover({
      anchor: element,
      label: "Alternatives of the token",
      content: [
        this.details(token),
        h("h3", {
          class: "popover-title",
          text: count ? `Continue from one of ${count} tokens` : "No alternatives",
        }),
        count
          ? list
          : h("p", {
            class: "secondary",
            text: "The request asked for none: “Alternatives” in the settings is their number.",
          }),
        h(
          "div",
          { class: "row end" },
          button({ label: "Close", kind: "quiet", small: true, onclick: () => close() }),
        ),
      ],
    });
  }

  /**
   * @param {Token} token
   * @param {import("./generation.js").Alternative} other
   * @param {(id: number) => void} onchoose
   */
  #choice(token, other, onchoose) {
    const isOwn = other.id === token.id;
    const label = `${isOwn ? "Generate again after" : "Continue with"} `
      + `${this.vocabulary.label(other.id)}, ${formatPercent(Math.exp(other.logprob))}`;
    return h(
      "button",
      {
        type: "button", class: "bare bar-button", "aria-label": label,
        tabindex: other === token.alternatives[0] ? 0 : -1,
        onclick: () => onchoose(other.id),
      },
      this.#bar(other, isOwn),
    );
  }
}
