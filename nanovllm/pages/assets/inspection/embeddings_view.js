/** Embeddings: tokens as points in two dimensions, with search and nearest neighbours. */

import { scatterPlot } from "../charts/scatter_plot.js";
import { busy, card, errorMessage, field, segmented, shareList } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { formatCount, formatPercent, tokenLabel } from "../elements/format.js";

/**
 * @import { Token } from "../elements/format.js"
 * @typedef {Token & {x: number, y: number}} EmbeddedToken
 * @typedef {Token & {cosine: number}} Neighbor
 * @typedef {{points: EmbeddedToken[], vocab: number, explained: number[], methods: string[]}}
 *   Projection
 */

const MAX_RESULTS = 30;
const NUM_NEIGHBORS = 10;
const LIMIT = 2500;
const MAX_POINTS = 5000; // of nanovllm/inspection/embeddings.py

const HINT =
  "Choose a point or a search result to see the tokens with the most similar embeddings.";
const TSNE_NOTE =
  "t-SNE keeps near neighbours near. Distances between groups, their sizes and the axes have " +
  "no meaning.";

/**
 * Return an explorer of projections of the token embeddings.
 *
 * `marked` are ids to bring out. `load` fetches a projection that is absent, `neighborsOf` the
 * nearest tokens of an id.
 * @param {{projections: Record<string, Projection>,
 *   neighbors?: Record<string, Neighbor[]> | null, marked?: number[],
 *   load?: (method: string) => Promise<Projection>,
 *   neighborsOf?: (id: number) => Promise<Neighbor[]>}} data
 * @returns {HTMLElement}
 */
export function embeddingsExplorer(data) {
  const { projections, neighbors, marked = [], load, neighborsOf } = data;
  /** @type {Map<string, Projection | Promise<Projection>>} */
  const known = new Map(Object.entries(projections));
  const plot = scatterPlot({ onSelect: (/** @type {EmbeddedToken} */ point) => select(point) });
  const note = h("p", { class: "secondary v-lead" });
  const extent = h("p", { class: "secondary v-lead" });
  const more = load ? null : moreText(known);
  const message = h("div", {});
  const choice = h("div", {});
  const search = h("input", {
    type: "search",
    class: "input",
    placeholder: "for example: king",
    oninput: () => showResults(),
  });
  const results = h("ul", { class: "row v-results" });
  const found = h("p", { class: "secondary small-text", "aria-live": "polite" });
  const chosen = h("div", { class: "stack tight" });
  /** @type {EmbeddedToken[]} */
  let points = [];
  /** @type {Token | null} */
  let selected = null;
  let wanted = "";

  /** @param {string} method */
  async function showMethod(method) {
    wanted = method;
    let projection;
    try {
      const loading = known.get(method) ?? load?.(method);
      if (!loading) return;
      known.set(method, loading);
      replace(message, busy(BUSY_TEXTS[method]));
      note.textContent = "";
      plot.element.classList.add("v-outdated");
      projection = await loading;
    } catch (/** @type {any} */ error) {
      known.delete(method);
      if (wanted === method) replace(message, errorMessage(error.message));
      return;
    }
    if (wanted !== method) return;
    offer(load ? projection.methods : [...known.keys()], method);
    replace(message);
    plot.element.classList.remove("v-outdated");
    points = projection.points;
    note.textContent = method === "pca" ? explainedText(projection) : TSNE_NOTE;
    extent.textContent = extentText(projection, marked);
    plot.update(points, method === "pca" ? axisNames(projection) : ["t-SNE 1", "t-SNE 2"]);
    if (selected) plot.select(selected.id);
    showResults();
  }

  function showResults() {
    const text = search.value.trim().toLowerCase();
    const matches = text ? points.filter((point) => isMatch(point, text)) : [];
    matches.sort((a, b) => a.text.trim().length - b.text.trim().length);
    found.textContent = text ? foundText(matches.length) : "";
    plot.highlight(text ? matches.map(({ id }) => id) : marked);
    replace(results, [
      matches.slice(0, MAX_RESULTS).map((point) => h("li", {}, tokenButton(point))),
    ]);
  }

  /** @param {number} count */
  function foundText(count) {
    const listed = count > MAX_RESULTS ? `; the ${MAX_RESULTS} shortest are listed` : "";
    return `${formatCount(count)} of the ${formatCount(points.length)} shown tokens${listed}`;
  }

  /** @param {Token} point */
  function tokenButton(point) {
    return h("button", {
      class: "pill v-result ellipsis",
      text: tokenLabel(point),
      title: `token id ${point.id}`,
      onclick: () => select(point),
    });
  }

  /** @param {Token} point */
  async function select(point) {
    selected = point;
    plot.select(point.id);
    const list = h("div", {});
    replace(
      chosen,
      h("h3", {}, "Nearest to ", h("code", { text: tokenLabel(point) })),
      h("p", {
        class: "secondary small-text",
        text:
          `Token id ${point.id}. Cosine similarity of the whole ` +
          "embeddings, not of the two dimensions of the picture.",
      }),
      list,
    );
    try {
      const nearest = neighbors?.[point.id] ?? (await neighborsOf?.(point.id));
      if (selected !== point) return;
      if (!nearest) {
        list.append("This file has no neighbours of this token.");
        return;
      }
      plot.link(nearest.map(({ id }) => id));
      const format = (/** @type {number} */ cosine) => cosine.toFixed(3);
      list.append(shareList(nearest, ({ cosine }) => cosine, format, tokenButton));
    } catch (/** @type {any} */ error) {
      replace(list, errorMessage(error.message));
    }
  }

  /**
   * Offer the methods to choose from, where there are several.
   * @param {string[]} methods
   * @param {string} value
   */
  function offer(methods, value) {
    if (methods.length < 2 || choice.childElementCount) return;
    const options = methods.map((each) => ({ value: each, label: METHOD_NAMES[each] }));
    choice.append(segmented({ label: "Projection", options, value, onchange: showMethod }));
  }

  chosen.append(h("p", { class: "secondary", text: HINT }));
  showMethod(load ? "pca" : [...known.keys()][0]);
  return h("div", { class: "columns v-embeddings" }, [
    card("Token embeddings", { beside: choice }, [note, extent, more, message, plot.element]),
    h("section", { class: "card stack", "aria-label": "Search and neighbours" }, [
      field({ label: "Search tokens", control: search }),
      found,
      results,
      chosen,
    ]),
  ]);
}

/** @type {Record<string, string>} */
const METHOD_NAMES = { pca: "PCA", tsne: "t-SNE" };
/** @type {Record<string, string>} */
const BUSY_TEXTS = { pca: "Computing PCA", tsne: "Computing t-SNE, some seconds" };

/**
 * Return whether a token contains a text; one with a backslash may also be an escape.
 * @param {Token} point
 * @param {string} text
 */
function isMatch(point, text) {
  const names = text.includes("\\") ? [point.text, tokenLabel(point)] : [point.text];
  return names.some((name) => name.toLowerCase().includes(text));
}

/**
 * Return how many tokens of the vocabulary are shown, and why not all.
 * @param {Projection} projection
 * @param {number[]} marked
 */
function extentText({ points, vocab }, marked) {
  const count = formatCount(points.length);
  if (points.length === vocab) return `All ${count} tokens of the vocabulary are shown.`;
  return (
    `${count} of the ${formatCount(vocab)} tokens of the vocabulary are shown, those with the ` +
    `lowest ids${marked.length ? " and those of the prompt" : ""}. A BPE vocabulary is numbered ` +
    "in the order of its merges, so low ids are frequent tokens; more points would cover each " +
    "other. Nearest neighbours are among all tokens."
  );
}

/** Return how a file gets more tokens and projections. @param {Map<string, any>} projections */
function moreText(projections) {
  const [{ points, vocab }] = projections.values();
  const hasMost = points.length >= Math.min(vocab, MAX_POINTS);
  /** @param {string} text */
  const option = (text) => h("code", { text });
  const ways = [];
  const most = `, up to ${formatCount(MAX_POINTS)}`;
  if (!hasMost) ways.push(["tokens with ", option("--limit N"), most]);
  if (!projections.has("tsne")) ways.push(["t-SNE with ", option("--method tsne")]);
  if (!ways.length) return null;
  return h("p", { class: "secondary v-lead" }, [
    option("nanovllm visualize embeddings"),
    " adds ",
    ways.flatMap((way, index) => [index ? ", and " : "", ...way]),
    ".",
  ]);
}

/** @param {Projection} projection */
function explainedText({ explained }) {
  const [first, second] = explained;
  return (
    "The two directions in which the shown embeddings differ most. They " +
    `explain ${formatPercent(first)} and ${formatPercent(second)} of the variance; the picture ` +
    `does not show the other ${formatPercent(1 - first - second)}.`
  );
}

/** @param {Projection} projection */
function axisNames({ explained }) {
  return explained.map(
    (part, index) => `component ${index + 1} (${formatPercent(part)} of the variance)`,
  );
}

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function embeddingsView({ api }) {
  const element = h("div", {});
  return {
    element,
    show() {
      if (element.childElementCount) return;
      element.append(
        embeddingsExplorer({
          projections: {},
          load: (method) => api.get(`v1/inspect/embeddings?method=${method}&limit=${LIMIT}`),
          neighborsOf: async (id) =>
            (await api.get(`v1/inspect/neighbors?token=${id}&count=${NUM_NEIGHBORS}`)).neighbors,
        }),
      );
    },
  };
}
