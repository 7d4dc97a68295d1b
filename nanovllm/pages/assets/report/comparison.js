/** The report that compares several runs. */

import { lineKey } from "../charts/line_chart.js";
import { h } from "../elements/dom.js";
import { formatCompact, formatCount, formatElapsed } from "../elements/format.js";
import { comparedCurves, hasDifferentTokens } from "./report_curves.js";
import {
  commandSection,
  formatBits,
  formatLoss,
  formatPerplexity,
  known,
  MAX_ROWS,
  MISSING,
  notices,
  promptNote,
  sampleCard,
  stateBadge,
  stepsOf,
  table,
} from "./report_parts.js";

/** @import { Run } from "./report_curves.js" */

/** Return the elements of a page that compares runs. @param {Run[]} runs */
export function comparison(runs) {
  return [
    h("ul", { class: "runs" }, [
      runs.map((run, index) =>
        h("li", {}, [
          runName(run, index),
          " ",
          stateBadge(run.state),
          ` step ${stepsOf(run)}`,
          notices(run, run.state),
        ]),
      ),
    ]),
    resultSection(runs),
    comparedCurves(runs),
    differenceSection(runs),
    lastSampleSection(runs),
    bestCommandSection(runs),
  ];
}

/**
 * Return a run's name beside a piece of its line.
 * @param {{name: string}} run
 * @param {number} color
 */
function runName({ name }, color) {
  return h("span", { class: "run-name" }, lineKey({ name, color, points: [] }), name);
}

/** @param {Run[]} runs */
function hasDifferentTexts(runs) {
  return new Set(runs.map((run) => run.validation_bytes)).size > 1;
}

/** @param {Run[]} runs */
function resultSection(runs) {
  const losses = runs.map(({ best }) => best?.val_loss ?? null);
  const bits = runs.map((run) => run.bits_per_byte);
  const isOneText = !hasDifferentTexts(runs);
  const isOneVocabulary = isOneText && !hasDifferentTokens(runs);
  const heads = [
    "Run",
    "State",
    "Best validation loss",
    "at step",
    "Perplexity",
    "Bits per byte",
    "Parameters",
    "Steps",
    "Tokens",
    "Tokens per second",
    "Time",
  ];
  const rows = runs.map((run, index) => [
    runName(run, index),
    stateBadge(run.state),
    bestOf(losses, index, formatLoss, isOneVocabulary),
    known(run.best?.step, formatCount),
    known(losses[index], formatPerplexity),
    bestOf(bits, index, formatBits, isOneText),
    known(run.parameters, formatCompact),
    stepsOf(run),
    known(run.last.tokens, formatCompact),
    known(run.tokens_per_s, formatCount),
    known(run.last.elapsed_s, formatElapsed),
  ]);
  return h("section", {}, [
    h("h2", { text: "Results" }),
    table("Results", heads, rows),
    resultWarning(runs),
  ]);
}

/**
 * Return a value, emphasized if it is the lowest of values that can be compared.
 * @param {(number | null)[]} values
 * @param {number} index
 * @param {(value: number) => string} format
 * @param {boolean} isComparable
 */
function bestOf(values, index, format, isComparable) {
  const text = known(values[index], format);
  const lowest = Math.min(...values.filter((value) => value !== null));
  return isComparable && values[index] === lowest ? h("strong", { text }) : text;
}

/** Return a note if the losses are of different tokens or texts. @param {Run[]} runs */
function resultWarning(runs) {
  if (hasDifferentTexts(runs)) {
    return h("p", {
      class: "message",
      text: "The runs have different validation texts, so their losses cannot be compared.",
    });
  }
  if (!hasDifferentTokens(runs) || runs.some((run) => !run.bits_per_byte_factor)) return null;
  return h("p", {
    class: "message",
    text:
      "The runs have different tokenizers, so their losses per token cannot be compared. The losses " +
      "below are in bits per byte.",
  });
}

/** Return the settings in which runs differ. @param {Run[]} runs */
function differenceSection(runs) {
  const flat = runs.map(({ settings }) => Object.assign({}, ...Object.values(settings)));
  const names = [...new Set(flat.flatMap((settings) => Object.keys(settings)))];
  const rows = names
    .filter((name) => name !== "output" && name !== "started")
    .map((name) => [name, ...flat.map((settings) => settings[name] ?? MISSING)])
    .filter(([, ...values]) => new Set(values).size > 1)
    .slice(0, MAX_ROWS);
  const title = "Settings that differ";
  const heads = ["Setting", ...runs.map(({ name }) => name)];
  return h("section", {}, [
    h("h2", { text: title }),
    rows.length
      ? table(title, heads, rows, "texts")
      : h("p", { class: "secondary", text: "The runs have the same settings." }),
  ]);
}

/** @param {Run[]} runs */
function lastSampleSection(runs) {
  const found = runs.filter(({ samples }) => samples.length);
  if (!found.length) return null;
  const last = found.map(({ name, samples }) => ({ name, sample: samples.at(-1) }));
  const note = promptNote(last.map(({ sample }) => sample));
  return h("section", {}, [
    h("h2", { text: "Last samples" }),
    note && h("p", { class: "secondary small-text" }, note),
    h("div", { class: "compared" }, [
      last.map(({ name, sample }) =>
        sampleCard(`${name} · step ${formatCount(sample.step)}`, sample),
      ),
    ]),
  ]);
}

/** Return the commands that use the best run, if the losses can be compared. @param {Run[]} runs */
function bestCommandSection(runs) {
  if (hasDifferentTexts(runs)) return null;
  const bits = runs.map((run) => run.bits_per_byte);
  const losses = runs.map(({ best }) => best?.val_loss ?? null);
  const scores = bits.includes(null) ? losses : bits;
  const index = scores.indexOf(Math.min(...scores.filter((score) => score !== null)));
  return index < 0
    ? null
    : commandSection(runs[index].commands, `Use the best model, ${runs[index].name}`);
}
