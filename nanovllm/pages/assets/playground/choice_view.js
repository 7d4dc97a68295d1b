/** One choice of a run: its text, figures and chart. */

import { probabilityChart } from "../charts/probability_chart.js";
import { draftsText, endText, isOpen, speed } from "../client/generation.js";
import { shortId } from "../client/request_ids.js";
import { button, copyText, tokenInWord } from "../elements/components.js";
import { append, h, replace } from "../elements/dom.js";
import { formatDuration, formatNumber, formatPercent } from "../elements/format.js";
import { tokenText } from "./token_text.js";

/**
 * @import { Choice } from "../client/generation.js"
 * @import { Vocabulary } from "../client/vocabulary.js"
 * @import { Coloring } from "./token_text.js"
 * @typedef {{promptText: string, isScore: boolean, coloring: Coloring,
 *   numAlternatives: number}} Appearance
 * @typedef {ReturnType<typeof choiceView>} ChoiceView
 */

const TIMES_NOTE =
  "Times are measured in this browser, from sending the request. They include the network, waiting " +
  "in the queue, and pauses of the engine. The Engine tab has the times of the server.";
/** Least time between two drawings of a chart that grows. */
const CHART_INTERVAL_MS = 200;

/**
 * Return the view of a choice, which grows while it is generated.
 * @param {{vocabulary: Vocabulary, label: string, title: string | null,
 *   toolbar: HTMLElement | null, onbranch: (position: number, id: number) => void,
 *   onextend: () => void, onfollow: (request: Choice["request"]) => void,
 *   oninspect: (view: "attention" | "lens", text: string) => void}} options
 */
export function choiceView(options) {
  const { vocabulary, label, title, toolbar, onbranch, onextend, onfollow, oninspect } = options;
  /** @type {Choice | null} */
  let shown = null;
  let drawnMs = -Infinity;
  const figures = h("dl", { class: "figures" });
  const note = h("p", { class: "secondary small-text", text: TIMES_NOTE });
  const badges = h("div", { class: "row" });
  const onclick = () => onfollow(shown?.request ?? null);
  const link = h("a", { class: "small-text", href: "#engine", onclick });
  const actions = h("div", { class: "row" });
  const text = tokenText({ vocabulary, label, onbranch, onpoint: (at) => chart.mark(at) });
  const chart = probabilityChart({
    onpoint: text.mark,
    details: (index) => text.details(/** @type {Choice} */ (shown).tokens[index]),
    onselect: (index) => text.focus(index, { isQuiet: false }),
  });
  const element = h("article", { class: "stack choice", "aria-label": label }, [
    h("div", { class: "row between" }, badges, link),
    [text.element, toolbar, actions, figures, note, chart.element],
  ]);

  /** Link to the request in the engine view. @param {Choice} choice */
  function updateLink({ request, status }) {
    link.hidden = !request || status === "failed";
    if (!request || link.title.includes(request.id)) return;
    link.textContent = `Show ${shortId(request.id)} in Engine`;
    link.title = `Show the request ${request.id} in the engine view`;
  }

  /** @param {Choice} choice @param {Appearance} appearance */
  function updateActions(choice, { isScore, promptText }) {
    actions.hidden = isOpen(choice) || !choice.tokens.length;
    if (actions.hidden || actions.childElementCount) return;
    const whole = () => promptText + vocabulary.join(choice.tokens.map(({ id }) => id));
    /** @param {string} name @param {() => void} act @param {string} [icon] */
    const action = (name, act, icon) => button(name, { icon, kind: "quiet", small: true }, act);
    append(actions, [
      !isScore && action("Continue", onextend, "play"),
      action("Copy text", () => copyText(whole(), "text"), "copy"),
      action("Attention", () => oninspect("attention", whole())),
      action("Logit lens", () => oninspect("lens", whole())),
    ]);
  }

  /** @param {Choice} choice */
  function drawChart({ tokens, promptIds }) {
    const ids = tokens.map(({ id }) => id);
    chart.update({
      logprobs: tokens.map(({ logprob }) => logprob),
      firstPosition: promptIds.length,
      nameOf: (index) => vocabulary.label(ids[index]),
      wordOf: (index) => vocabulary.word(ids, index),
    });
  }

  return {
    element,
    /** Move the focus to a token. @param {number} position */
    focus: (position) => text.focus(position),
    /** @param {Choice} choice @param {Appearance} appearance */
    update(choice, appearance) {
      shown = choice;
      const isRunning = isOpen(choice);
      element.classList.toggle("running", isRunning);
      text.update({ tokens: choice.tokens, ...appearance });
      const nowMs = performance.now();
      if (!isRunning || nowMs - drawnMs >= CHART_INTERVAL_MS) {
        drawnMs = nowMs;
        drawChart(choice);
      }
      const progress = choice.status === "waiting" ? "waiting" : "generating";
      const end = isRunning ? progress : endText(choice);
      replace(
        badges,
        title && h("span", { class: "badge", text: title }),
        end && h("span", { class: isRunning ? "badge accent" : "badge", text: end }),
      );
      updateLink(choice);
      const entries = [
        ...(appearance.isScore ? scoreFigures(choice) : speedFigures(choice)),
        ...textFigures(choice, vocabulary),
      ];
      replace(figures, [
        entries.map(([name, value]) =>
          h("div", { class: "figure" }, h("dt", { text: name }), h("dd", {}, value)),
        ),
      ]);
      figures.hidden = !choice.tokens.length;
      note.hidden = figures.hidden || appearance.isScore;
      updateActions(choice, appearance);
    },
  };
}

/** @param {Choice} choice @returns {[string, any][]} */
function speedFigures(choice) {
  const { count, ttftS, tokensPerS, isWhole } = speed(choice);
  const drafts = draftsText(choice);
  const range = isWhole ? ", with the time to the first token" : "";
  return [
    ["Tokens", choice.firstNewToken ? `${count} new, ${choice.tokens.length} in all` : `${count}`],
    ["Time to first token, browser", ttftS === null ? "–" : formatDuration(ttftS)],
    ["Speed", tokensPerS === null ? "–" : `${formatNumber(tokensPerS)}\u202Ftokens/s${range}`],
    ...(drafts ? [/** @type {[string, string]} */ (["Speculative decoding", drafts])] : []),
  ];
}

/** @param {Choice} choice @returns {[string, any][]} */
function scoreFigures({ tokens }) {
  const total = tokens.reduce((sum, { logprob }) => sum + (logprob ?? 0), 0);
  return [
    ["Tokens", String(tokens.length)],
    ["Log-probability", formatNumber(total, 4)],
  ];
}

/**
 * Return the perplexity and the token of the lowest probability.
 * @param {Choice} choice
 * @param {Vocabulary} vocabulary
 * @returns {[string, any][]}
 */
function textFigures({ tokens, promptIds }, vocabulary) {
  const logprobs = tokens.flatMap(({ logprob }) => logprob ?? []);
  if (!logprobs.length) return [];
  const mean = logprobs.reduce((sum, logprob) => sum + logprob, 0) / logprobs.length;
  const lowest = Math.min(...logprobs);
  const index = tokens.findIndex(({ logprob }) => logprob === lowest);
  const ids = tokens.map(({ id }) => id);
  const where = `, position ${promptIds.length + index} (from 0)`;
  const word = tokenInWord(vocabulary.word(ids, index));
  return [
    ["Perplexity", formatNumber(Math.exp(-mean))],
    ["Lowest probability", [`${formatPercent(Math.exp(lowest))}, `, word, where]],
  ];
}
