/** The charts of a report: losses, learning rate, gradient norm and throughput. */

import { lineChart, MAX_MARKERS } from "../charts/line_chart.js";
import { h } from "../elements/dom.js";
import { shortNumber } from "../elements/format.js";
import { load, store, write } from "../elements/saved.js";

const MEAN_NOTE =
  "The training loss of an evaluation is the mean over the steps since the evaluation before, so " +
  "it lags behind the loss of the current weights.";
const SMOOTH_NOTE = "A point is the mean of up to a hundredth of the run's steps.";
const SMOOTH_POINTS = 100;
const MAX_PEAK_RATIO = 50; // to the median run's, of a learning rate that is drawn
const STEPS = { metric: "step", title: "step", isWhole: true, unit: 1 };
const OTHERS = [
  { metric: "lr", title: "Learning rate", yTitle: "learning rate" },
  {
    metric: "grad_norm",
    title: "Gradient norm",
    yTitle: "L2 norm before clipping",
    mayBeLog: true,
  },
  { metric: "tokens_per_s", title: "Throughput", yTitle: "tokens per second" },
];

/**
 * A run as the report's data has it: metrics as columns, null where a value is not known.
 * @typedef {{name: string, bits_per_byte_factor: number | null,
 *   best: {step: number, val_loss: number, [metric: string]: any} | null,
 *   evaluations: Record<string, (number | null)[]>, updates: Record<string, (number | null)[]>,
 *   [name: string]: any}} Run
 * @typedef {{metric: string, title: string, isWhole?: boolean, unit: number}} Position an x axis
 * @typedef {[number, number | null]} XY
 * @import { Line } from "../charts/line_chart.js"
 */

/** Return the charts of one run: both losses in one chart. @param {Run} run */
export function runCurves(run) {
  const { best } = run;
  const panels = positions([run]).map((position) => {
    const training = points(run, position, "train_loss");
    const x = best?.[position.metric] ?? null;
    const label = `best: ${best?.val_loss.toFixed(4)} at step ${best?.step}`;
    const mark = best && x !== null ? { x: x / position.unit, y: best.val_loss, label } : undefined;
    const hasUpdates = run.updates.step.length > 0;
    return {
      ...position,
      lines: [
        {
          name: "training, one step",
          color: 1,
          isMinor: true,
          points: updatePoints(run, position, "train_loss"),
        },
        {
          name: "training, mean since the last evaluation",
          color: 1,
          points: training,
          hasLine: !hasUpdates || training.length > MAX_MARKERS,
          hasMarkers: true,
        },
        {
          name: "validation",
          color: 0,
          points: points(run, position, "val_loss"),
          hasMarkers: true,
          mark,
        },
      ],
    };
  });
  const note = best ? `${MEAN_NOTE} The large dot is the lowest validation loss.` : MEAN_NOTE;
  return section([lossChart({ title: "Loss", yTitle: "nats per token", panels, note })], [run]);
}

/**
 * Return the charts of several runs, a line for each in every chart.
 *
 * Losses of different tokenizers are shown in bits per byte.
 * @param {Run[]} runs
 */
export function comparedCurves(runs) {
  const factors = runs.map((run) => run.bits_per_byte_factor);
  const inBits = hasDifferentTokens(runs) && !factors.includes(null);
  const yTitle = inBits ? "bits per byte" : "nats per token";
  const losses = [
    { metric: "val_loss", title: "Validation loss" },
    { metric: "train_loss", title: "Training loss", note: SMOOTH_NOTE },
  ].map(({ metric, ...chart }) =>
    lossChart({
      ...chart,
      yTitle,
      panels: positions(runs).map((position) => ({
        ...position,
        lines: runLines(runs, position, metric, inBits),
      })),
    }),
  );
  return section(losses, runs);
}

/** Return whether runs have a different number of tokens per byte of text. @param {Run[]} runs */
export function hasDifferentTokens(runs) {
  return new Set(runs.map((run) => run.bits_per_byte_factor)).size > 1;
}

/** @param {HTMLElement[]} losses @param {Run[]} runs */
function section(losses, runs) {
  const others = OTHERS.map(({ metric, ...chart }) => {
    const lines = runLines(runs, STEPS, metric);
    const { kept, note } = metric === "lr" ? withoutOutliers(lines) : { kept: lines, note: "" };
    return lineChart({ ...chart, fromZero: true, note, panels: [{ ...STEPS, lines: kept }] });
  });
  const charts = h("div", { class: "columns thirds" }, losses, others);
  return h("section", {}, h("h2", { text: "Curves" }), charts);
}

/**
 * Return the chart of a loss, whose x axis stays chosen when the page reloads itself.
 * @param {Omit<Parameters<typeof lineChart>[0], "isLarge">} chart
 */
function lossChart(chart) {
  const key = `${location.pathname} x axis of ${chart.title}`;
  /** @param {string} value */
  const onchoose = (value) => store(key, write(value));
  const choice = load(key, String);
  return lineChart({ ...chart, isLarge: true, mayBeLog: true, choice, onchoose });
}

/**
 * Return a metric of each run as a line: that of its updates, where it has them, or of its
 * evaluations.
 * @param {Run[]} runs
 * @param {Position} position
 * @param {string} metric
 * @param {boolean} [inBits]
 */
function runLines(runs, position, metric, inBits = false) {
  return runs.map((run, color) => {
    const scale = (inBits && run.bits_per_byte_factor) || 1;
    const updates = updatePoints(run, position, metric, scale);
    const shown = metric === "train_loss" ? smooth(updates) : updates;
    const hasMarkers = !shown.length;
    const drawn = hasMarkers ? points(run, position, metric, scale) : shown;
    return { name: run.name, color, points: drawn, hasMarkers };
  });
}

/**
 * Return lines without those that would flatten the others, and a note that names these.
 * @param {Line[]} lines
 */
function withoutOutliers(lines) {
  /** @param {Line} line */
  const peakOf = ({ points: all }) => Math.max(0, ...all.map(([, y]) => y ?? 0));
  const known = lines
    .map(peakOf)
    .filter((peak) => peak > 0)
    .sort((a, b) => a - b);
  const limit = known.length ? known[(known.length - 1) >> 1] * MAX_PEAK_RATIO : Infinity;
  const left = lines.filter((line) => peakOf(line) > limit);
  const named = left.map((line) => `${line.name} (up to ${shortNumber(peakOf(line))})`);
  const note = left.length ? `Not drawn, far above the others: ${named.join(", ")}.` : "";
  return { kept: lines.filter((line) => peakOf(line) <= limit), note };
}

/**
 * Return the means of at most SMOOTH_POINTS groups of consecutive points.
 * @param {XY[]} all
 * @returns {XY[]}
 */
function smooth(all) {
  const known = all.filter(([, y]) => y !== null);
  const size = Math.max(1, Math.ceil(known.length / SMOOTH_POINTS));
  /** @param {number[]} numbers */
  const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;
  return Array.from({ length: Math.ceil(known.length / size) }, (_, index) => {
    const group = known.slice(index * size, (index + 1) * size);
    return [mean(group.map(([x]) => x)), mean(group.map(([, y]) => y ?? 0))];
  });
}

/**
 * Return the x axes of the losses: steps, tokens and time.
 * @param {Run[]} runs
 * @returns {Position[]}
 */
function positions(runs) {
  const longestS = Math.max(...runs.map((run) => run.last.elapsed_s ?? 0));
  const isShort = longestS < 180;
  const isLong = longestS >= 3 * 3600;
  const name = isShort ? "seconds" : isLong ? "hours" : "minutes";
  const unit = isShort ? 1 : isLong ? 3600 : 60;
  return [
    STEPS,
    { metric: "tokens", title: "tokens", isWhole: true, unit: 1 },
    { metric: "elapsed_s", title: `time (${name})`, unit },
  ];
}

/**
 * Return a metric of the evaluations over another; those without an x are left out.
 * @param {Run} run
 * @param {Position} position
 * @param {string} yMetric
 * @returns {XY[]}
 */
function points({ evaluations }, { metric, unit }, yMetric, scale = 1) {
  return evaluations[metric].flatMap((x, index) =>
    x === null ? [] : [[x / unit, scaled(evaluations[yMetric][index], scale)]],
  );
}

/**
 * Return a metric of the updates; tokens and time are interpolated between evaluations.
 * @param {Run} run
 * @param {Position} position
 * @param {string} yMetric
 * @returns {XY[]}
 */
function updatePoints({ updates, evaluations }, { metric, unit }, yMetric, scale = 1) {
  if (!(yMetric in updates)) return [];
  /** @type {XY[]} */
  const pairs = updates.step.map((step, index) => [
    step ?? 0,
    scaled(updates[yMetric][index], scale),
  ]);
  if (metric === "step") return pairs;
  const knots = evaluations.step.flatMap((step, index) => {
    const x = evaluations[metric][index];
    return step === null || x === null ? [] : [{ step, x }];
  });
  return pairs.flatMap(([step, y]) => {
    const after = knots.findIndex((knot) => knot.step >= step);
    if (after < 0 || (after === 0 && knots[0].step !== step)) return []; // outside of evaluations
    const [low, high] = [knots[Math.max(0, after - 1)], knots[after]];
    const part = high.step > low.step ? (step - low.step) / (high.step - low.step) : 0;
    return [[(low.x + part * (high.x - low.x)) / unit, y]];
  });
}

/** @param {number | null} value @param {number} scale */
function scaled(value, scale) {
  return value === null ? null : value * scale;
}
