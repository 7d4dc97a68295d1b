/** Axes of charts: their ranges, round ticks, and the labels of these. */

import { shortNumber } from "../elements/format.js";

const MIN_LOG_RATIO = 50;
const MIN_RANGE = 1e-100;
/** @type {[number, string][]} */
const SUFFIXES = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "k"],
];

/** @typedef {{low: number, high: number, isLog: boolean}} Scale */

/**
 * Return the position of a value on an axis: 0 at its low end, 1 at its high end.
 * @param {Scale} scale
 * @param {number} value
 */
export function fraction({ low, high, isLog }, value) {
  if (isLog) return Math.log(value / low) / Math.log(high / low);
  return (value - low) / (high - low);
}

/**
 * Return a scale that contains the values, with a margin around them.
 *
 * `fromZero` puts one end of the axis at zero. `mayBeLog` chooses a logarithmic axis for positive
 * values that span a factor of 50 or more. Values are at most 1e100.
 * @param {number[]} values
 * @param {{fromZero?: boolean, mayBeLog?: boolean}} [options]
 * @returns {Scale}
 */
export function fitScale(values, { fromZero = false, mayBeLog = false } = {}) {
  let [low, high] = values.reduce(
    ([least, most], value) => [Math.min(least, value), Math.max(most, value)],
    [Infinity, -Infinity],
  );
  if (mayBeLog && low > MIN_RANGE && high / low >= MIN_LOG_RATIO) {
    const margin = (high / low) ** 0.04;
    return { low: low / margin, high: high * margin, isLog: true };
  }
  if (fromZero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (high - low <= Math.max(Math.abs(low), Math.abs(high)) * 1e-9 + MIN_RANGE) {
    const half = Math.abs(low) * 0.05;
    if (half <= MIN_RANGE) return { low: 0, high: 1, isLog: false };
    return { low: low - half, high: high + half, isLog: false };
  }
  const margin = (high - low) * 0.05;
  return {
    low: fromZero && low === 0 ? low : low - margin,
    high: fromZero && high === 0 ? high : high + margin,
    isLog: false,
  };
}

/**
 * Return about `count` round values within a scale, at multiples of `minStep`.
 * @param {Scale} scale
 * @param {number} count
 */
export function ticks({ low, high, isLog }, count, minStep = 0) {
  if (isLog) return logTicks(low, high, count);
  const nice = Math.max(minStep, niceStep((high - low) / count));
  const step = minStep && !Number.isInteger(nice / minStep) ? 2 * nice : nice; // 5 instead of 2.5
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => rounded((first + index) * step));
}

/**
 * Return the labels of ticks: 0, 5k, 10k. On a linear axis all have one unit.
 * @param {Scale} scale
 * @param {number[]} values
 */
export function tickLabels({ isLog }, values) {
  const largest = Math.max(0, ...values.map(Math.abs));
  return values.map((value) => {
    const size = isLog ? Math.abs(value) : largest;
    const [unit, suffix] = SUFFIXES.find(([one]) => size >= Math.max(one, 10_000)) ?? [1, ""];
    return value === 0 ? "0" : shortNumber(value / unit, 6) + suffix;
  });
}

/**
 * Return the smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `step`.
 * @param {number} step
 */
function niceStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return ([1, 2, 2.5, 5].find((nice) => step <= power * nice) ?? 10) * power;
}

/**
 * Return powers of ten, with multiples between them if there is room for these.
 * @param {number} low
 * @param {number} high
 * @param {number} count
 */
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const length = Math.ceil(Math.log10(high)) - first + 1;
  /** @type {number[]} */
  let found = [];
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    found = Array.from({ length }, (_, index) =>
      digits.map((digit) => Number(`${digit}e${first + index}`)),
    ).flat();
    found = found.filter((value) => value >= low && value <= high);
    if (found.length <= count + 1) return found;
  }
  const every = Math.ceil(found.length / count);
  return found.filter((_, index) => index % every === 0);
}

/** @param {number} value */
function rounded(value) {
  return Number(value.toPrecision(12));
}
