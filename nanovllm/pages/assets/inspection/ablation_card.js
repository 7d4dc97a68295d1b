/** The card in which parts of the network are switched off, and what a prompt's predictions become. */

import { tokenStrip } from "../charts/heatmap.js";
import { busy, button, card, errorMessage, shareList } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { formatPercent, tokenLabel } from "../elements/format.js";
import { formatChange, partGrid, partName, partsOf } from "./part_grid.js";

/**
 * @import { Token } from "../elements/format.js"
 * @import { Cell } from "./lens_view.js"
 * @import { Part, PartLoss } from "./part_grid.js"
 * @typedef {{loss: number | null, cells: Cell[]}} Prediction
 * @typedef {{tokens: Token[], layers: number, heads: number, whole: Prediction,
 *   ablated: Prediction}} Ablation
 */

const SETTLE_MS = 150; // without another choice before a request
const MAX_FALL_NATS = 3; // of a token's log-probability; a larger one is not darker
const LEAST_PROBABILITY = 1e-30;
const LEAD =
  "Choose parts of the network: they then add nothing to the residual stream. A row is a layer; " +
  "attn and ffn are its attention and feed-forward sublayers, block is both.";
const STRIP_LEAD =
  "The darker a token, the less probable it has become. Choose a token for the predictions of " +
  "what follows it.";

/**
 * Return the card of a prompt. `load` asks an endpoint of /v1/inspect about this prompt.
 * @param {{load: (name: string, body: object, signal: AbortSignal) => Promise<any>}} options
 */
function ablationCard({ load }) {
  const body = h("div", { class: "stack" }, busy("Computing the predictions"));
  const element = card("Switch parts off", { class: "v-ablation", lead: LEAD }, [body]);
  /** @type {Set<Part>} */
  const off = new Set();
  /** @type {AbortController | null} */
  let running = null;
  let timer = 0;

  function stop() {
    clearTimeout(timer);
    running?.abort();
    running = null;
  }

  /**
   * Ask an endpoint, and show its answer; a new call aborts the last one.
   * @param {string} name
   * @param {object} request
   * @param {(answer: any) => void} show
   * @param {Element} problems
   */
  async function ask(name, request, show, problems) {
    const controller = new AbortController();
    running = controller;
    element.setAttribute("aria-busy", "true");
    try {
      const answer = await load(name, request, controller.signal);
      if (controller.signal.aborted) return;
      replace(problems);
      show(answer);
    } catch (/** @type {any} */ error) {
      if (controller.signal.aborted) return;
      replace(problems, errorMessage(error.message));
    }
    element.removeAttribute("aria-busy");
  }

  /** @param {Ablation} first the predictions of the whole network */
  function build({ tokens, layers, heads, whole }) {
    const parts = partsOf(layers, heads);
    const problems = h("div");
    const comparison = comparisonOf(tokens, whole);
    const grid = partGrid(parts, (part) => {
      if (!off.delete(part)) off.add(part);
      change();
    });
    const measure = button("Measure each part", { small: true }, () => {
      stop();
      ask("ablation_map", {}, showMap, problems);
    });
    const reset = button("Switch all on", { small: true, kind: "quiet" }, () => {
      off.clear();
      change();
    });

    /** @param {{loss: number | null, parts: PartLoss[]}} map */
    function showMap({ loss, parts: measured }) {
      const losses = new Map(measured.map((part) => [partName(part), part.loss]));
      grid.show(
        parts.map((part) => {
          const without = losses.get(partName(part)) ?? null;
          return loss === null || without === null ? null : without - loss;
        }),
      );
    }

    function change() {
      stop();
      grid.mark(off);
      reset.disabled = !off.size;
      if (!off.size) {
        element.removeAttribute("aria-busy");
        comparison.show(whole, []);
        return;
      }
      const chosen = parts.filter((part) => off.has(part));
      timer = setTimeout(
        () =>
          ask(
            "ablation",
            { off: chosen },
            (answer) => comparison.show(answer.ablated, chosen),
            problems,
          ),
        SETTLE_MS,
      );
    }

    replace(body, [
      h("div", { class: "columns v-ablation-columns" }, [
        h("div", { class: "stack" }, [
          grid.element,
          h("p", {
            class: "secondary small-text",
            text:
              "Measured, a cell is the rise of the loss without this part alone, in nats per " +
              "token. Heads have a colour scale of their own.",
          }),
          h("div", { class: "row" }, measure, reset),
          problems,
        ]),
        comparison.element,
      ]),
    ]);
    change();
  }

  ask("ablation", {}, build, body);
  return { element, stop };
}

/**
 * Return the card of a prompt in a view, which ends with the view's signal.
 * @param {import("../inspector/main.js").Context} context
 * @param {string} prompt
 * @param {AbortSignal} signal
 */
export function ablationOf(context, prompt, signal) {
  const result = ablationCard({
    load: (name, body, cardSignal) =>
      context.api.post(`v1/inspect/${name}`, { prompt, ...body }, { signal: cardSignal }),
  });
  signal.addEventListener("abort", result.stop);
  return result;
}

/**
 * Return the predictions of the whole network beside those without parts.
 * @param {Token[]} tokens
 * @param {Prediction} whole
 */
function comparisonOf(tokens, whole) {
  let ablated = whole;
  let hasParts = false;
  let position = tokens.length - 1;
  const title = h("p", { class: "v-ablation-loss", "aria-live": "polite" });
  const names = h("p", { class: "secondary small-text" });
  const lists = h("div", { class: "v-ablation-lists" });
  const strip = tokenStrip(tokens, {
    label: "The prompt, shaded by the fall of each token's probability",
    onSelect: (index) => {
      position = index;
      render();
    },
  });

  /** @param {Prediction} prediction @param {number} index of a token */
  const probability = ({ cells }, index) => (index ? (cells[index - 1].p_of_next ?? 0) : 1);

  /** @param {number} index of a token */
  function fall(index) {
    const [before, after] = [whole, ablated].map((each) =>
      Math.log(Math.max(probability(each, index), LEAST_PROBABILITY)),
    );
    return Math.min(Math.max(before - after, 0) / MAX_FALL_NATS, 1);
  }

  /** @param {number} index of a token */
  function describe(index) {
    const name = `${tokenLabel(tokens[index])} (${index})`;
    if (!index) return `${name}: the first token has no probability`;
    const [before, after] = [whole, ablated].map((each) => formatPercent(probability(each, index)));
    return hasParts ? `${name}: ${before}, then ${after}` : `${name}: ${before}`;
  }

  function render() {
    strip.shade(fall, describe, position);
    const columns = [predictionList("Whole model", whole.cells[position])];
    if (hasParts) columns.push(predictionList("Parts off", ablated.cells[position]));
    replace(
      lists,
      h("p", {
        class: "secondary v-ablation-after",
        text: `Most likely after ${tokenLabel(tokens[position])} (${position})`,
      }),
      columns,
    );
  }
  return {
    element: h("div", { class: "stack" }, [
      h("div", {}, title, names),
      h("p", { class: "secondary small-text", text: STRIP_LEAD }),
      strip.element,
      lists,
    ]),
    /** @param {Prediction} prediction @param {Part[]} off */
    show(prediction, off) {
      ablated = prediction;
      hasParts = off.length > 0;
      replace(title, lossText(whole.loss, hasParts ? ablated.loss : null));
      names.textContent = hasParts ? `Off: ${off.map(partName).join(" · ")}` : "Nothing is off.";
      render();
    },
  };
}

/**
 * @param {number | null} whole
 * @param {number | null} ablated null while nothing is off
 */
function lossText(whole, ablated) {
  if (whole === null) return "A prompt of one token has no loss.";
  const unit = " nats per token";
  if (ablated === null) return ["Loss ", h("strong", { text: whole.toFixed(3) }), unit];
  const change = formatChange(ablated - whole, 3);
  return [
    `Loss ${whole.toFixed(3)} → `,
    h("strong", { text: ablated.toFixed(3) }),
    `${unit} (${change})`,
  ];
}

/** @param {string} title @param {Cell} cell */
function predictionList(title, { top }) {
  return h("div", {}, [
    h("h3", { text: title }),
    shareList(
      top,
      ({ p }) => p,
      formatPercent,
      (token) => h("code", { text: tokenLabel(token) }),
    ),
  ]);
}
