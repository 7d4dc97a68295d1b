/** The script of a training report: shows one run, or compares several. */

import { lineKey } from "../charts/line_chart.js";
import { h, replace } from "../elements/dom.js";
import { showData } from "../elements/file.js";
import { formatCompact, formatCount, formatElapsed, shortNumber } from "../elements/format.js";
import { load, store, write } from "../elements/saved.js";
import { comparedCurves, hasDifferentTokens, runCurves } from "./report_curves.js";

/**
 * @import { Run } from "./report_curves.js"
 * @typedef {{step: number, text: string, prompt: string}} Sample
 */

const MISSING = "–";
const MAX_ROWS = 100;
/** @type {Record<string, string>} */
const STATES = {
  running: "Running",
  finished: "Finished",
  stopped: "Stopped",
  failed: "Failed",
  unknown: "State unknown",
};
/** @type {[string, string, (value: number) => string][]} */
const COLUMNS = [
  ["step", "Step", formatCount],
  ["train_loss", "Training loss", formatLoss],
  ["val_loss", "Validation loss", formatLoss],
  ["lr", "Learning rate", shortNumber],
  ["grad_norm", "Gradient norm", shortNumber],
  ["tokens_per_s", "Tokens/s", formatCount],
  ["tokens", "Tokens", formatCompact],
  ["elapsed_s", "Time", formatElapsed],
];

/**
 * Return a value as `format` writes it, or a dash where it is not known.
 * @param {number | null | undefined} value
 * @param {(value: number) => string} format
 */
function known(value, format) {
  return value === null || value === undefined ? MISSING : format(value);
}

/** Return a loss with four decimals, or without decimals if it is large. @param {number} value */
function formatLoss(value) {
  return Math.abs(value) < 1000 ? value.toFixed(4) : shortNumber(value);
}

/** Return exp(loss). @param {number} loss in nats per token */
function formatPerplexity(loss) {
  if (loss > Math.log(1e15)) return MISSING;
  const perplexity = Math.exp(loss);
  return perplexity < 1000 ? perplexity.toFixed(2) : formatCompact(perplexity);
}

/** @param {number} bits */
function formatBits(bits) {
  return bits.toFixed(3);
}

/** Return the elements of a page about one run. @param {Run} run */
function runReport(run) {
  return [
    runHead(run),
    tiles(run),
    runCurves(run),
    sampleSection(run),
    commandSection(run.commands),
    settingSection(run),
    evaluationSection(run),
  ];
}

/** @param {Run} run */
function runHead({ step, total_steps: total, state, last, ...run }) {
  const parts = [`step ${formatCount(step)}`];
  if (total !== null) {
    parts[0] += ` of ${formatCount(total)}`;
    parts.push(`${Math.floor((100 * step) / total)} %`);
    if (state === "running" && step && last.elapsed_s) {
      parts.push(`${formatElapsed((last.elapsed_s / step) * (total - step))} left`);
    }
  }
  const label = "progress of the run in steps";
  return h("section", { class: "stack tight" }, [
    h("p", { class: "row secondary" }, stateBadge(state), parts.join(" · ")),
    total !== null && h("progress", { max: total, value: step, "aria-label": label, class: state }),
    notices(run, state),
  ]);
}

/** @param {string} state */
function stateBadge(state) {
  return h("span", { class: `badge state ${state}`, text: STATES[state] });
}

/**
 * Return why a run ended, whether it overfits, and what could not be read.
 * @param {Run} run
 * @param {string} state
 */
function notices({ message, notices: others }, state) {
  const kind = state === "failed" ? "message error" : "message";
  return [
    message && h("p", { class: kind, text: message }),
    others.map((/** @type {string} */ text) => h("p", { class: "message", text })),
  ];
}

/** @param {Run} run */
function tiles({ best, last, total_steps: total, parameters, sizes, ...run }) {
  const loss = best?.val_loss ?? null;
  const lastSpeed = known(last.tokens_per_s, formatCount);
  const items = [
    ["Best validation loss", known(loss, formatLoss), best && `at step ${formatCount(best.step)}`],
    ["Perplexity", known(loss, formatPerplexity), "of the best checkpoint"],
    ["Bits per byte", known(run.bits_per_byte, formatBits), "of validation text"],
    ["Steps", formatCount(run.step), total !== null && `of ${formatCount(total)}`],
    ["Tokens", known(last.tokens, formatCompact), "seen in training"],
    ["Tokens per second", known(run.tokens_per_s, formatCount), `median; last ${lastSpeed}`],
    ["Time", known(last.elapsed_s, formatElapsed), "of training and evaluation"],
    ["Parameters", known(parameters, formatCompact), sizes],
  ];
  return h(
    "dl",
    { class: "tiles" },
    items.map(([name, value, note]) =>
      h("div", { class: "card tile" }, [
        h("dt", { text: name }),
        h("dd", { text: value }),
        note && value !== MISSING && h("dd", { class: "small-text secondary", text: note }),
      ]),
    ),
  );
}

/** Return the samples over time, of which a slider chooses one. @param {Run} run */
function sampleSection({ samples, num_samples: count, evaluations }) {
  if (!samples.length) return null;
  const lossAt = new Map(evaluations.step.map((at, index) => [at, evaluations.val_loss[index]]));
  /** @param {Sample} sample */
  const nameOf = ({ step }) => `Step ${formatCount(step)}`;
  /** @param {Sample} sample */
  const titleOf = (sample) => {
    const loss = lossAt.get(sample.step) ?? null;
    return nameOf(sample) + (loss === null ? "" : ` · validation loss ${formatLoss(loss)}`);
  };
  const box = h("div");
  const final = samples.length - 1;
  const key = `${location.pathname} sample`;
  const slider = h("input", {
    type: "range",
    min: 0,
    max: final,
    step: 1,
    "aria-label": "sample",
    oninput: show,
  });
  function show() {
    const chosen = samples[Number(slider.value)];
    slider.setAttribute("aria-valuetext", titleOf(chosen));
    replace(box, sampleCard(titleOf(chosen), chosen));
    // The last sample stays the last one when new ones arrive.
    store(key, write(Number(slider.value) === final ? "last" : nameOf(chosen)));
  }
  const stored = load(key, String);
  const found = samples.findIndex((/** @type {Sample} */ sample) => nameOf(sample) === stored);
  slider.value = String(found < 0 ? final : found);
  show();
  const selected = count > samples.length ? `, of which ${samples.length} are shown` : "";
  return h("section", {}, [
    h("h2", { text: "Samples over time" }),
    h("p", { class: "secondary small-text" }, [
      "Text that the model generated at each evaluation: " +
        `${formatCount(count)} samples${selected}.`,
      promptNote(samples),
    ]),
    final > 0 && h("label", { class: "row small-text slider" }, "first", slider, "last"),
    box,
  ]);
}

/** @param {string} title @param {Sample} sample */
function sampleCard(title, { text, prompt }) {
  const rest = text.slice(prompt.length);
  const marked = prompt && h("mark", { text: prompt });
  return h("article", { class: "card sample" }, [
    h("h3", { text: title }),
    h("pre", { dir: "auto" }, marked, rest),
  ]);
}

/** Return what a marked prompt is, if a sample has one. @param {Sample[]} samples */
function promptNote(samples) {
  if (!samples.some(({ prompt }) => prompt)) return null;
  const text = " beginning of a sample is its prompt, the first tokens of the validation text.";
  return [" The ", h("mark", { text: "marked" }), text];
}

/**
 * Return commands for the checkpoint, {what it does: command}.
 * @param {Record<string, string>} commands
 * @param {string} [title]
 */
function commandSection(commands, title = "Use the model") {
  if (!Object.keys(commands).length) return null;
  const rows = Object.entries(commands).map(([label, command]) => [
    h("dt", { text: label }),
    h("dd", {}, h("code", { text: command })),
  ]);
  return h("section", {}, h("h2", { text: title }), h("dl", { class: "card commands" }, rows));
}

/** @param {Run} run */
function settingSection({ settings, defaults }) {
  const groups = Object.entries(settings).filter(([, values]) => Object.keys(values).length);
  if (!groups.length) return null;
  const tables = groups.map(([group, values]) => {
    const mark = group === "Training" ? defaults : [];
    const rows = Object.entries(values).map(([name, value]) =>
      h("tr", {}, [
        h("th", { scope: "row", text: name }),
        h("td", {}, value, mark.includes(name) && h("span", { class: "secondary" }, " default")),
      ]),
    );
    return h("table", { class: "card settings-table" }, [
      h("caption", { text: group }),
      h("tbody", {}, rows),
    ]);
  });
  return h("section", {}, h("h2", { text: "Settings" }), h("div", { class: "settings" }, tables));
}

/** Return the evaluations as numbers. @param {Run} run */
function evaluationSection({ evaluations, num_evaluations: count }) {
  const steps = evaluations.step;
  if (!steps.length) return null;
  const limit = Math.min(steps.length, MAX_ROWS);
  const shown = Array.from({ length: limit }, (_, index) =>
    Math.floor((index * (steps.length - 1)) / Math.max(limit - 1, 1)),
  );
  const rows = shown
    .reverse()
    .map((index) => COLUMNS.map(([name, , format]) => known(evaluations[name][index], format)));
  const key = `${location.pathname} evaluations`;
  const isOpen = load(key, Boolean);
  const selected = count > limit ? `; ${limit} are shown` : "";
  return h("section", {}, [
    h(
      "details",
      {
        open: isOpen,
        ontoggle: (/** @type {any} */ event) => store(key, write(event.target.open)),
      },
      [
        h("summary", {}, h("h2", { text: `Evaluations (${formatCount(count)}${selected})` })),
        h("p", { class: "secondary small-text" }, [
          "A training loss is the mean over the steps since the evaluation before.",
        ]),
        table(
          "Evaluations",
          COLUMNS.map(([, title]) => title),
          rows,
        ),
      ],
    ),
  ]);
}

/**
 * Return a table that scrolls sideways where the page is narrow; a row begins with its name.
 * @param {string} name
 * @param {string[]} heads
 * @param {import("../elements/dom.js").Leaf[][]} rows
 * @param {string} [kind]
 */
function table(name, heads, rows, kind = "numbers") {
  const head = h(
    "tr",
    {},
    heads.map((text) => h("th", { scope: "col", text })),
  );
  const body = rows.map(([first, ...rest]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, first),
      rest.map((cell) => h("td", {}, cell)),
    ),
  );
  return h("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": name }, [
    h("table", { class: kind }, h("thead", {}, head), h("tbody", {}, body)),
  ]);
}

/** Return the elements of a page that compares runs. @param {Run[]} runs */
function comparison(runs) {
  return [
    h(
      "ul",
      { class: "runs" },
      runs.map((run, index) =>
        h("li", {}, [
          runName(run, index),
          " ",
          stateBadge(run.state),
          ` step ${stepsOf(run)}`,
          notices(run, run.state),
        ]),
      ),
    ),
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

/** @param {Run} run */
function stepsOf({ step, total_steps: total }) {
  return formatCount(step) + (total === null ? "" : ` of ${formatCount(total)}`);
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
    h(
      "div",
      { class: "compared" },
      last.map(({ name, sample }) =>
        sampleCard(`${name} · step ${formatCount(sample.step)}`, sample),
      ),
    ),
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

/**
 * Return when the page was written, and a warning if a running run is silent for long.
 * @param {{written: string, silence_s: number | null}} data
 */
function footer({ written, silence_s: silenceS }) {
  const ageMinutes = Math.round((Date.now() - Date.parse(written)) / 60_000);
  const age = ageMinutes < 120 ? `${ageMinutes} minutes` : `${Math.round(ageMinutes / 60)} hours`;
  const warning =
    silenceS !== null &&
    ageMinutes * 60 >= silenceS &&
    h("p", {
      class: "message error",
      text: `The last evaluation was ${age} ago. The process may have been killed.`,
    });
  const time = written.replace("T", " ").replace("+00:00", " UTC");
  const live = silenceS === null ? "" : " This page reloads itself while the run goes on.";
  return [warning, h("p", { class: "secondary small-text" }, `Written ${time}.${live}`)];
}

showData((data) => {
  const { runs } = data;
  const [warning, written] = footer(data);
  return [warning, runs.length > 1 ? comparison(runs) : runReport(runs[0]), written];
});
