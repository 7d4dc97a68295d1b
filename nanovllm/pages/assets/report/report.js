/** The script of a training report: shows one run, or compares several. */

import { h, replace } from "../elements/dom.js";
import { showData } from "../elements/file.js";
import { formatCompact, formatCount, formatElapsed, shortNumber } from "../elements/format.js";
import { load, store, write } from "../elements/saved.js";
import { comparison } from "./comparison.js";
import { runCurves } from "./report_curves.js";
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
  table,
} from "./report_parts.js";

/**
 * @import { Run } from "./report_curves.js"
 * @import { Sample } from "./report_parts.js"
 */

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
  return h("dl", { class: "tiles" }, [
    items.map(([name, value, note]) =>
      h("div", { class: "card tile" }, [
        h("dt", { text: name }),
        h("dd", { text: value }),
        note && value !== MISSING && h("dd", { class: "small-text secondary", text: note }),
      ]),
    ),
  ]);
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
