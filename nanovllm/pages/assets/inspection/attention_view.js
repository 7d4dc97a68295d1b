/** Attention: all heads of a prompt as small maps, one large, and its weights as shaded text. */

import { onThemeChange } from "../charts/colors.js";
import { heatMap, tokenStrip, weightFraction, weightLegend } from "../charts/heatmap.js";
import { card, errorMessage, field, icon } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { formatNumber, formatPercent, tokenLabel } from "../elements/format.js";
import { sortableTable } from "../elements/sortable_table.js";
import { ablationOf } from "./ablation_card.js";
import { headGrid } from "./head_grid.js";
import {
  countRepeats,
  describeHead,
  findBest,
  finderCard,
  HEAD_KINDS,
  withoutChance,
} from "./head_kinds.js";
import { headRow } from "./head_row.js";
import { promptForm } from "./prompt_form.js";

/**
 * @import { Token } from "../elements/format.js"
 * @import { Head } from "./head_kinds.js"
 * @typedef {{weights: string, dtype: string, encoding?: string}} Weights of one layer or of all
 */

const MAX_WHOLE_WEIGHTS = 16 * 2 ** 20; // 64 MiB; above it, weights are fetched layer by layer
const TOP_KEYS = 5;
const KINDS_LEAD =
  "The strongest head of each kind in this prompt, with its mean attention weight from the third " +
  "token on. Layers and heads are counted from 0.";
const HEADS_LEAD =
  "Each square is a map of one head: a row is a token that attends (query), a column a token " +
  "attended to (key). Choose one to enlarge it; arrow keys move.";
const TEXT_LEAD =
  "Choose a token to see what it attends to. Later tokens have no weight: attention is causal.";
const REPEATING_EXAMPLE = "The old man saw a ship. The old man saw a ship.";

/**
 * Return the weights of a response of POST /v1/inspect/attention as one array.
 * @param {Weights} attention
 * @returns {Promise<Float32Array>}
 */
export async function decodeWeights({ weights, dtype, encoding }) {
  const text = atob(weights);
  let bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  if (encoding === "gzip") {
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    bytes = new Uint8Array(await new Response(unpacked).arrayBuffer());
  }
  if (dtype === "uint16") return Float32Array.from(new Uint16Array(bytes.buffer), (w) => w / 65535);
  if (dtype === "uint8") return Float32Array.from(bytes, (w) => w / 255);
  return new Float32Array(bytes.buffer);
}

/**
 * Return an explorer of one prompt's attention weights.
 *
 * Without `loadLayer` the response contains all layers; with it, each layer is loaded when needed.
 * `onExample` shows a prompt in which an induction head can be seen, `row` how the chosen row is
 * computed, `ablation` the parts that can be switched off.
 * @param {{attention?: Weights, overview: {tokens: Token[], heads: Head[]},
 *   loadLayer?: (layer: number) => Promise<Weights>, onExample?: () => void,
 *   row?: ReturnType<typeof headRow>, ablation?: ReturnType<typeof ablationOf>}} data
 * @returns {HTMLElement}
 */
export function attentionExplorer({ attention, overview, loadLayer, onExample, row, ablation }) {
  const { tokens } = overview;
  const numRepeats = countRepeats(tokens);
  const heads = withoutChance(overview.heads, numRepeats);
  // All of the model's, or those that a file contains.
  const layers = [...new Set(heads.map(({ layer }) => layer))];
  const headNumbers = [...new Set(heads.map(({ head }) => head))];
  const size = tokens.length;
  const rowWeights = (size * (size + 1)) / 2;
  const layerSize = headNumbers.length * rowWeights;
  const weightsOf = layerWeights({ attention, loadLayer, layers, layerSize });
  const best = findBest(heads);
  let selected = best.previous_token ?? heads[0];
  let query = size - 1;
  /** @type {(query: number, key: number) => number} */
  let weightAt = () => 0;

  const title = h("h2", { tabindex: -1 });
  const kinds = h("p", { class: "secondary" });
  const reading = h("p", { class: "v-reading", "aria-live": "polite" });
  const map = heatMap({
    onRead(newQuery, key, isKept) {
      query = newQuery;
      describeRow(key);
      if (isKept) row?.show({ layer: selected.layer, head: selected.head, query }, key);
    },
  });
  const strip = tokenStrip(tokens, {
    label: "The prompt, shaded by the weights of the chosen row",
    onSelect: (index) => map.selectQuery(index),
  });
  const topKeys = h("p", { class: "secondary" });
  const layerSelect = numberSelect(layers, (layer) => select(headOf(layer, selected.head)));
  const headSelect = numberSelect(headNumbers, (head) => select(headOf(selected.layer, head)));
  /** @param {Head} head */
  const onSelect = (head) => select(head);
  const grid = headGrid(heads, layers, headNumbers, onSelect);
  const table = statisticsTable(heads, onSelect, (head) => head === selected);
  const cards = HEAD_KINDS.map((kind) =>
    finderCard(kind, best[kind.key], { numRepeats, onSelect, onExample }),
  );

  /** @param {number} layer @param {number} head */
  const headOf = (layer, head) =>
    /** @type {Head} */ (heads.find((one) => one.layer === layer && one.head === head));

  /** @param {Head} head */
  async function select(head) {
    selected = head;
    grid.select(head);
    for (const card of cards) card.mark(head);
    table.render();
    layerSelect.value = String(head.layer);
    headSelect.value = String(head.head);
    title.textContent = `Layer ${head.layer}, head ${head.head}`;
    kinds.textContent = describeHead(head);
    const weights = await load(head.layer);
    if (selected !== head || !weights) return;
    const start = headNumbers.indexOf(head.head) * rowWeights;
    weightAt = (row, key) => weights[start + (row * (row + 1)) / 2 + key];
    map.update(tokens, weightAt);
  }

  /**
   * Return a layer's weights; null if they cannot be loaded, which the view then says.
   * @param {number} layer
   */
  async function load(layer) {
    try {
      return await weightsOf(layer);
    } catch (/** @type {any} */ error) {
      if (error.name !== "AbortError") replace(reading, errorMessage(error.message));
      return null;
    }
  }

  /** @param {number} key */
  function describeRow(key) {
    /** @param {number} index */
    const name = (index) => `${tokenLabel(tokens[index])} (${index})`;
    replace(
      reading,
      h("code", { text: name(query) }),
      " attends to ",
      h("code", { text: name(key) }),
      " with weight ",
      h("strong", { text: weightAt(query, key).toFixed(4) }),
    );
    strip.shade(
      (index) => (index <= query ? weightFraction(weightAt(query, index)) : 0),
      (index) =>
        index <= query
          ? `${name(index)}: ${weightAt(query, index).toFixed(4)}`
          : `${name(index)}: later than the chosen token`,
      query,
    );
    const keys = Array.from({ length: query + 1 }, (_, index) => index);
    keys.sort((a, b) => weightAt(query, b) - weightAt(query, a));
    const texts = keys
      .slice(0, TOP_KEYS)
      .map((at) => `“${name(at)}” ${weightAt(query, at).toFixed(4)}`);
    topKeys.textContent = `Largest weights of this row: ${texts.join(" · ")}. A row sums to 1.`;
  }

  async function paintThumbnails() {
    for (const layer of layers) {
      const weights = await load(layer);
      if (!weights) return;
      for (const [index, head] of headNumbers.entries()) {
        const start = index * rowWeights;
        grid.paint(layer, head, size, (row, key) => weights[start + (row * (row + 1)) / 2 + key]);
      }
    }
  }

  const selects = h("div", { class: "row" }, [
    field({ label: "Layer", control: layerSelect }),
    field({ label: "Head", control: headSelect }),
  ]);
  const element = h("div", { class: "v-attention stack" }, [
    h("section", { "aria-label": "Kinds of head" }, [
      h("h2", { text: "What heads attend to" }),
      h("p", { class: "secondary v-lead", text: KINDS_LEAD }),
      h("div", { class: "v-finders" }, [...cards.map((each) => each.element)]),
    ]),
    h("div", { class: "columns v-columns" }, [
      card("All heads", { lead: HEADS_LEAD }, [
        grid.element,
        h("details", { class: "v-details" }, [
          h("summary", {}, icon("chevron"), "Statistics of all heads, sortable"),
          table.element,
        ]),
      ]),
      h("section", { class: "card v-head-card", "aria-label": "The chosen head" }, [
        h("div", { class: "card-header" }, h("div", {}, title, kinds), selects),
        reading,
        map.element,
        weightLegend(),
      ]),
      card("The same row as text", { class: "v-text-card", lead: TEXT_LEAD }, [
        strip.element,
        topKeys,
      ]),
    ]),
    row?.element,
    ablation?.element,
  ]);
  onThemeChange(element, paintThumbnails);
  select(selected);
  paintThumbnails();
  return Object.assign(element, { weightsOf }); // for scripts: the weights of a layer
}

/**
 * Return a function from a layer to its weights. The last two layers are kept.
 * @param {{attention?: Weights, loadLayer?: (layer: number) => Promise<Weights>, layers: number[],
 *   layerSize: number}} source
 */
function layerWeights({ attention, loadLayer, layers, layerSize }) {
  if (!loadLayer) {
    const all = decodeWeights(/** @type {Weights} */ (attention));
    return async (/** @type {number} */ layer) => {
      const start = layers.indexOf(layer) * layerSize;
      return (await all).subarray(start, start + layerSize);
    };
  }
  /** @type {Map<number, Promise<Float32Array>>} */
  const kept = new Map();
  return (/** @type {number} */ layer) => {
    const weights = kept.get(layer) ?? loadLayer(layer).then(decodeWeights);
    kept.delete(layer);
    kept.set(layer, weights);
    const [oldest] = kept.keys();
    if (kept.size > 2) kept.delete(oldest);
    weights.catch(() => kept.delete(layer));
    return weights;
  };
}

/** @param {number[]} numbers @param {(value: number) => void} onSelect */
function numberSelect(numbers, onSelect) {
  const options = numbers.map((value) => h("option", { value, text: `${value}` }));
  /** @param {any} event */
  const onchange = (event) => onSelect(Number(event.target.value));
  return h("select", { class: "select v-number", onchange }, options);
}

/**
 * @param {Head[]} heads
 * @param {(head: Head) => void} onSelect
 * @param {(head: Head) => boolean} isSelected
 */
function statisticsTable(heads, onSelect, isSelected) {
  /** @param {number | null} value */
  const percent = (value) => (value === null || value === undefined ? "–" : formatPercent(value));
  /** @param {number} value */
  const number = (value) => formatNumber(value);
  return sortableTable({
    caption: "Statistics of all heads",
    columns: [
      { key: "layer", label: "Layer", format: String },
      { key: "head", label: "Head", format: String },
      ...HEAD_KINDS.map(({ key, name, what }) => ({
        key,
        label: name,
        title: `mean weight on ${what}`,
        format: percent,
      })),
      { key: "distance", label: "Distance", title: "mean distance in tokens", format: number },
      { key: "entropy", label: "Entropy", title: "mean entropy of a row in nats", format: number },
    ],
    rows: heads,
    sortKey: "previous_token",
    onSelect,
    isSelected,
  });
}

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function attentionView(context) {
  const form = promptForm({
    context,
    action: "Show attention",
    hint:
      "Shows which earlier tokens each head reads. At most 512 tokens, or the model's context; the " +
      "server computes the weights beside its other requests.",
    async compute(prompt, signal) {
      const overview = await context.api.post("v1/inspect/overview", { prompt }, { signal });
      const size = overview.tokens.length;
      /** @param {number | null} layer */
      const load = (layer) =>
        context.api.post("v1/inspect/attention", { prompt, layer }, { signal });
      const isWhole = (overview.heads.length * size * (size + 1)) / 2 <= MAX_WHOLE_WEIGHTS;
      const onExample = () => form.run(REPEATING_EXAMPLE);
      const source = isWhole ? { attention: await load(null) } : { loadLayer: load };
      const row = headRow({
        tokens: overview.tokens,
        load: (chosen, rowSignal) =>
          context.api.post(
            "v1/inspect/attention_head",
            { prompt, ...chosen },
            { signal: rowSignal },
          ),
      });
      signal.addEventListener("abort", row.stop);
      const ablation = ablationOf(context, prompt, signal);
      return attentionExplorer({ overview, onExample, row, ablation, ...source });
    },
  });
  return form;
}
