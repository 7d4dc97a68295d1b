/** The range of an axis: values far out do not squeeze the others (Tukey 1977, outer fences). */

const FENCE = 3; // times the distance of the quartiles, beyond them

/**
 * Return the range of the values that are not far out.
 * @param {number[]} values
 * @returns {[number, number]}
 */
export function robustRange(values) {
  const sorted = Float64Array.from(values).sort();
  const at = (/** @type {number} */ part) => sorted[Math.round(part * (sorted.length - 1))];
  const reach = FENCE * (at(0.75) - at(0.25));
  const isIn = (/** @type {number} */ value) =>
    value >= at(0.25) - reach && value <= at(0.75) + reach;
  const inside = sorted.filter(isIn);
  return [inside[0], inside[inside.length - 1]];
}
