/** One choice of a run: its text, figures and chart. */

import { button, copyText, tokenInWord } from "./components.js";
import { append, h, replace } from "./dom.js";
import { formatDuration, formatNumber, formatPercent } from "./format.js";
import { endText, speed } from "./generation.js";
import { ProbabilityChart } from "./probability_chart.js";
import { shortId } from "./request_ids.js";
import { TokenText } from "./token_text.js";

const TIMES_NOTE =
  "Times are measured in this browser, from sending the request. They include the network, waiting "
  + "in the queue, and pauses of the engine. The Engine tab has the times of the server.";
/** Least time between two drawings of a chart that grows. */
const CHART_INTERVAL_MS = 200;

/**
 * @typedef {{promptText: string, isScore: boolean, coloring: import("./token_text.js").Coloring,
 *   numAlternatives: number}} Appearance
 */

/** Shows a choice, which grows while it is generated. */
export class ChoiceView {
  /**
   * @param {{vocabulary: import("./vocabulary.js").Vocabulary, label: string, title: string | null,
   *   toolbar: HTMLElement | null,
   *   onbranch: (position: number, id: number) => void, onextend: () => void,
   *   onfollow: (request: import("./generation.js").Choice["request"]) => void,
   *   oninspect: (view: "attention" | "lens", text: string) => void}} options
   */
  constructor({ vocabulary, label, title, toolbar, onbranch, onextend, onfollow, oninspect }) {
    this.vocabulary = vocabulary;
    this.title = title;
    this.onextend = onextend;
    this.oninspect = oninspect;
    this.drawnMs = -Infinity;
    this.figures = h("dl", { class: "figures" });
    this.note = h("p", { class: "secondary small-text", text: TIMES_NOTE });
    this.badges = h("div", { class: "row" });
    /** @type {import("./generation.js").Choice["request"]} */
    this.request = null;
    this.link = h("a", {
      class: "small-text", href: "#engine", onclick: () => onfollow(this.request),
    });
    this.actions = h("div", { class: "row" });
    this.text = new TokenText({
      vocabulary, label, onbranch, onpoint: (position) => this.chart.mark(position),
    });
    this.chart = new ProbabilityChart({
      vocabulary,
      onpoint: (position) => this.text.mark(position),
      details: (token) => this.text.details(token),
      onselect: (position) => this.text.at(position)?.focus(),
    });
    this.element = h(
      "article",
      { class: "choice", "aria-label": label },
      h("div", { class: "row between choice-header" }, this.badges, this.link),
      this.text.element, toolbar, this.actions, this.figures, this.note, this.chart.element,
    );
  }

  /**
   * @param {import("./generation.js").Choice} choice
   * @param {Appearance} appearance
   */
  update(choice, appearance) {
    const isRunning = choice.status === "running" || choice.status === "waiting";
    this.element.classList.toggle("running", isRunning);
    this.text.update({ tokens: choice.tokens, ...appearance });
    const nowMs = performance.now();
    if (!isRunning || nowMs - this.drawnMs >= CHART_INTERVAL_MS) {
      this.drawnMs = nowMs;
      this.chart.update(choice.tokens, choice.promptIds.length);
    }
    const progress = choice.status === "waiting" ? "waiting" : "generating";
    const end = isRunning ? progress : endText(choice);
    replace(
      this.badges,
      this.title && h("span", { class: "badge", text: this.title }),
      end && h("span", { class: isRunning ? "badge accent" : "badge", text: end }),
    );
    this.#updateLink(choice);
    const figures = [
      ...(appearance.isScore ? scoreFigures(choice) : speedFigures(choice)),
      ...textFigures(choice, this.vocabulary),
    ];
    replace(
      this.figures,
      choice.tokens.length > 0
        && figures.map(([name, value]) =>
          h("div", { class: "figure" }, h("dt", { text: name }), h("dd", {}, value)),
        ),
    );
    this.figures.hidden = !choice.tokens.length;
    this.note.hidden = this.figures.hidden || appearance.isScore;
    this.#updateActions(choice, appearance, isRunning);
  }

  /** Link to the request in the engine view. @param {import("./generation.js").Choice} choice */
  #updateLink({ request, status }) {
    this.link.hidden = !request || status === "failed";
    if (this.request === request || !request) return;
    this.request = request;
    this.link.textContent = `${shortId(request.id)} in Engine`;
    this.link.title = `Show the request ${request.id} in the engine view`;
  }

  /**
   * @param {import("./generation.js").Choice} choice
   * @param {Appearance} appearance
   * @param {boolean} isRunning
   */
  #updateActions(choice, appearance, isRunning) {
    this.actions.hidden = isRunning || !choice.tokens.length;
    if (this.actions.hidden || this.actions.childElementCount) return;
    const text = () =>
      appearance.promptText + this.vocabulary.join(choice.tokens.map((token) => token.id));
    const quiet = /** @type {const} */ ({ kind: "quiet", small: true });
    append(this.actions, [
      !appearance.isScore
        && button({ label: "Continue", icon: "play", ...quiet, onclick: () => this.onextend() }),
      button({
        label: "Copy text", icon: "copy", ...quiet, onclick: () => copyText(text(), "text"),
      }),
      button({
        label: "Attention", ...quiet, onclick: () => this.oninspect("attention", text()),
      }),
      button({ label: "Logit lens", ...quiet, onclick: () => this.oninspect("lens", text()) }),
    ]);
  }
}

/** @param {import("./generation.js").Choice} choice */
function speedFigures(choice) {
  const { count, ttftS, tokensPerS, isWhole } = speed(choice);
  const range = isWhole ? ", with the time to the first token" : "";
  return [
    ["Tokens", choice.firstNewToken ? `${count} new, ${choice.tokens.length} in all` : `${count}`],
    ["Time to first token, browser", ttftS === null ? "–" : formatDuration(ttftS)],
    ["Speed", tokensPerS === null ? "–" : `${formatNumber(tokensPerS)}\u202Ftokens/s${range}`],
  ];
}

/** @param {import("./generation.js").Choice} choice */
function scoreFigures(choice) {
  const logprobs = choice.tokens.map((token) => token.logprob ?? 0);
  const total = logprobs.reduce((sum, logprob) => sum + logprob, 0);
  return [
    ["Tokens", String(choice.tokens.length)],
    ["Log-probability", formatNumber(total, 4)],
  ];
}

/**
 * Return the perplexity and the token of the lowest probability.
 * @param {import("./generation.js").Choice} choice
 * @param {import("./vocabulary.js").Vocabulary} vocabulary
 */
function textFigures(choice, vocabulary) {
  const scored = choice.tokens.filter((token) => token.logprob !== null);
  if (!scored.length) return [];
  const mean = scored.reduce((sum, token) => sum + token.logprob, 0) / scored.length;
  const lowest = scored.reduce((low, token) => (token.logprob < low.logprob ? token : low));
  const index = choice.tokens.indexOf(lowest);
  const word = vocabulary.word(choice.tokens.map((token) => token.id), index);
  const position = choice.promptIds.length + index;
  const chance = formatPercent(Math.exp(lowest.logprob));
  return [
    ["Perplexity", formatNumber(Math.exp(-mean))],
    ["Lowest probability", [`${chance}, `, tokenInWord(word), `, position ${position} (from 0)`]],
  ];
}
