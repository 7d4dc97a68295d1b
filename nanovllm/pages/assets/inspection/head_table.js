/**
 * The table of a row of attention: a line for each token that the query sees, a strip of colours for
 * each vector. The cursor is a key and a dimension, whose products are read below the table.
 */

import { contextOf } from "../charts/canvas.js";
import { signedScale } from "../charts/colors.js";
import { scaleLegend } from "../charts/heatmap.js";
import { h, keyMove, replace, targetOf, uniqueId } from "../elements/dom.js";
import { formatNumber } from "../elements/format.js";
import { nameOf, scaling } from "./head_steps.js";

/**
 * @import { Token } from "../elements/format.js"
 * @import { Head } from "./head_steps.js"
 */

const SIGNED_STOPS = ["signed-low", "signed-zero", "signed-high"];
const LEGEND_VALUES = [-1, -0.25, 0, 0.25, 1];
/** @type {Record<string, [number, number]>} */
const ENDS = { Home: [-Infinity, 0], End: [Infinity, 0] };

/**
 * Return the table of a row.
 * @param {import("../elements/format.js").Token[]} tokens
 * @param {Head} row
 */
export function rowTable(tokens, row) {
  const { q, k, v, scores, weights, output, scale, query } = row;
  const size = q.length;
  const largest = {
    q: largestOf([q]),
    k: largestOf(k),
    v: Math.max(largestOf(v), largestOf([output])),
  };
  /** @type {Map<Element, (colorOf: (fraction: number) => number[]) => void>} */
  const strips = new Map();
  /** @param {"q" | "k" | "v"} name @param {number[]} values */
  const strip = (name, values) => {
    const element = h("div", { class: "v-vector" });
    strips.set(element, (colorOf) => paintStrip(element, values, largest[name], colorOf));
    return element;
  };
  const [low, high] = [Math.min(0, ...scores), Math.max(0, ...scores)];
  const span = high - low || 1;
  const mostWeight = Math.max(...weights);
  /** @param {number} score */
  const scoreBar = (score) =>
    bar((Math.min(score, 0) - low) / span, Math.abs(score) / span, score < 0 ? "v-negative" : "");
  /** @type {HTMLElement[]} */
  const rows = k.map(() => h("tr"));
  /** @param {number} index */
  const cellsOf = (index) => [
    h(
      "th",
      { scope: "row" },
      h("span", { class: "v-row-token ellipsis", text: nameOf(tokens, index) }),
    ),
    h("td", {}, strip("k", k[index])),
    h("td", {}, numberCell(scores[index].toFixed(2), scoreBar(scores[index]))),
    h("td", {}, numberCell(weights[index].toFixed(4), bar(0, weights[index] / mostWeight))),
    h("td", {}, [
      h("div", { class: "v-pair" }, [
        strip("v", v[index]),
        strip(
          "v",
          v[index].map((value) => value * weights[index]),
        ),
      ]),
    ]),
  ];
  /** @param {string} text */
  const formula = (text) => h("span", { class: "v-row-formula", text });
  const head = h("thead", {}, [
    h("tr", {}, [
      ["token", "key k", "score", "weight"].map((text) => h("th", { scope: "col", text })),
      h("th", { scope: "col" }, [
        h("div", { class: "v-pair" }, [
          h("span", { text: "value v" }),
          h("span", { text: "weight·v" }),
        ]),
      ]),
    ]),
    h("tr", { class: "v-whole" }, [
      h("th", { scope: "row", text: "query q" }),
      h("td", {}, strip("q", q)),
      h("td", {}, formula(`q · k ${scaling(scale, size)}`)),
      h("td", {}, formula("softmax")),
      h("td"),
    ]),
  ]);
  const foot = h("tfoot", {}, [
    h("tr", { class: "v-whole" }, [
      h("th", { scope: "row", text: "output" }),
      h("td"),
      h("td"),
      h("td", { text: "sum 1" }),
      h("td", {}, [
        h("div", { class: "v-pair" }, [h("span", { text: "sum Σ" }), strip("v", output)]),
      ]),
    ]),
  ]);
  const help = uniqueId("row-help");
  const table = h("table", { class: "v-row-table", vars: { "--dims": size } }, [
    h("caption", { class: "visually-hidden", text: "The steps for each token" }),
    head,
    h("tbody", {}, rows),
    foot,
  ]);
  const box = h(
    "div",
    {
      class: "v-row-scroll",
      tabindex: 0,
      role: "group",
      "aria-label": "Keys of the row",
      "aria-describedby": help,
    },
    table,
  );
  const reading = h("div", { class: "v-reading v-row-reading", "aria-live": "polite" });
  const cursor = { key: query, dimension: 0 };

  /** @param {number} key @param {number} dimension */
  function move(key, dimension) {
    rows[cursor.key].classList.remove("v-active");
    Object.assign(cursor, { key, dimension });
    rows[key].classList.add("v-active");
    table.style.setProperty("--dim", String(dimension));
    replace(reading, ...readings(tokens, row, key, dimension));
  }

  function reveal() {
    const { offsetTop, offsetHeight } = rows[cursor.key];
    const top = offsetTop - head.offsetHeight;
    const bottom = offsetTop + offsetHeight + foot.offsetHeight - box.clientHeight;
    box.scrollTop = Math.max(Math.min(box.scrollTop, top), bottom);
  }

  box.addEventListener("keydown", (event) => {
    const step = keyMove(event, ENDS);
    if (!step) return;
    event.preventDefault();
    const dimension = Math.min(Math.max(cursor.dimension + step[1], 0), size - 1);
    move(Math.min(Math.max(cursor.key + step[0], 0), query), dimension);
    reveal();
  });
  box.addEventListener("pointermove", (event) => {
    const target = targetOf(event);
    const at = rows.indexOf(target.closest("tr") ?? target);
    const vector = target.closest(".v-vector");
    if (at < 0 && !vector) return;
    let { dimension } = cursor;
    if (vector) {
      const { left, width } = vector.getBoundingClientRect();
      dimension = Math.floor(((event.clientX - left) / width) * size);
      dimension = Math.min(Math.max(dimension, 0), size - 1);
    }
    const key = at < 0 ? cursor.key : at;
    if (key !== cursor.key || dimension !== cursor.dimension) move(key, dimension);
  });

  // The cells of 512 tokens take too long to draw: a row has them from when it is nearly visible.
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        replace(target, cellsOf(rows.indexOf(/** @type {HTMLElement} */ (target))));
        paint(target);
      }
    },
    { root: box, rootMargin: "200px" },
  );
  for (const row of rows) observer.observe(row);

  function paint(part = /** @type {Element} */ (table)) {
    const colorOf = signedScale();
    for (const element of part.querySelectorAll(".v-vector")) strips.get(element)?.(colorOf);
  }

  paint();
  return {
    paint: () => paint(),
    /**
     * Move the cursor to a key, at the dimension that counts most in its score.
     * @param {number} key
     */
    mark(key) {
      const products = k[key].map((value, index) => Math.abs(value * q[index]));
      move(key, products.indexOf(Math.max(...products)));
      reveal();
    },
    element: h("div", { class: "stack tight" }, [
      box,
      reading,
      signedLegend(largest),
      h("p", {
        class: "secondary small-text",
        id: help,
        text:
          "Each strip is a vector, a colour for each dimension. Point at one, or move with the arrow " +
          "keys: ↑ ↓ another token, ← → another dimension.",
      }),
    ]),
  };
}

/**
 * @param {HTMLElement} element
 * @param {number[]} values
 * @param {number} most the value of the last colour
 * @param {(fraction: number) => number[]} colorOf
 */
function paintStrip(element, values, most, colorOf) {
  const canvas = h("canvas", { width: values.length, height: 1, "aria-hidden": "true" });
  const image = new ImageData(values.length, 1);
  values.forEach((value, index) => {
    image.data.set([...colorOf(valueFraction(value, most)), 255], index * 4);
  });
  contextOf(canvas).putImageData(image, 0, 0);
  replace(element, canvas);
}

/**
 * Return the numbers of a key, and of a dimension of it, as two lines.
 * @param {Token[]} tokens
 * @param {Head} head
 * @param {number} key
 * @param {number} dimension
 */
function readings(tokens, { q, k, v, scores, weights, output, scale }, key, dimension) {
  const [qi, ki, vi] = [q[dimension], k[key][dimension], v[key][dimension]];
  const dot = q.reduce((sum, value, index) => sum + value * k[key][index], 0);
  const weight = weights[key].toFixed(4);
  /** @param {number} value */
  const number = (value) => formatNumber(value, 4);
  return [
    h("p", {}, [
      h("code", { text: nameOf(tokens, key) }),
      ` q · k = ${number(dot)}, times ` +
        `${number(scale)} is the score ${number(scores[key])}; softmax: weight `,
      h("strong", { text: weight }),
    ]),
    h("p", { class: "secondary" }, [
      `Dimension ${dimension}: q ${number(qi)} × k ${number(ki)} = ` +
        `${number(qi * ki)} of q · k; weight ${weight} × v ${number(vi)} = ` +
        `${number(weights[key] * vi)} of the output ${number(output[dimension])}`,
    ]),
  ];
}

/**
 * Return the place of a value on the scale of colours from -1 to 1, as a square root.
 * @param {number} value
 * @param {number} most
 */
function valueFraction(value, most) {
  return most ? Math.sign(value) * Math.sqrt(Math.abs(value) / most) : 0;
}

/** @param {number[][]} vectors */
function largestOf(vectors) {
  return Math.max(...vectors.map((vector) => Math.max(...vector.map(Math.abs))));
}

/** @param {string} text @param {HTMLElement} chart */
function numberCell(text, chart) {
  return h("div", { class: "v-number-cell" }, h("span", { text: text.replace("-", "−") }), chart);
}

/**
 * Return a bar from a fraction of its track, so long.
 * @param {number} from
 * @param {number} length
 * @param {string} [kind]
 */
function bar(from, length, kind = "") {
  const part = h("span", { class: kind || null, vars: { "--from": from, "--length": length } });
  return h("span", { class: "v-bar", "aria-hidden": "true" }, part);
}

/** @param {Record<"q" | "k" | "v", number>} largest */
function signedLegend({ q, k, v }) {
  const ticks = LEGEND_VALUES.map((value) => ({
    at: (valueFraction(value, 1) + 1) / 2,
    text: `${value}`.replace("-", "−"),
  }));
  const label =
    `value, relative to the largest (q ${formatNumber(q)}, keys ${formatNumber(k)}, ` +
    `values and output ${formatNumber(v)})`;
  return scaleLegend({ label, ticks, stops: SIGNED_STOPS });
}
