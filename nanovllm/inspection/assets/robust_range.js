/** The range of an axis: a few values far out do not squeeze the others. */

const PART = 0.01; // of the values on each side that may lie outside
const MARGIN = 0.5; // of the range of the others, added on each side

/**
 * Return the range of the values, or that of all but the outermost with a margin if it is smaller.
 * @param {number[]} values
 * @returns {[number, number]}
 */
export function robustRange(values) {
  const sorted = Float64Array.from(values).sort();
  const last = sorted.length - 1;
  const skipped = Math.floor(PART * last);
  const [low, high] = [sorted[skipped], sorted[last - skipped]];
  const margin = MARGIN * (high - low);
  return [Math.max(sorted[0], low - margin), Math.min(sorted[last], high + margin)];
}
