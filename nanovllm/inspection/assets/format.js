/** Numbers with their units, and tokens, as text. */

const THIN_SPACE = "\u2009";

/** Return an integer with thin spaces between thousands. @param {number} value */
export function formatCount(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, THIN_SPACE);
}

/** Return a number with so many significant digits. @param {number} value */
export function formatNumber(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 10 ** digits) return formatCount(value);
  return Number(value.toPrecision(digits)).toString().replace("-", "−");
}

/** Return a probability in percent; small ones keep two digits. @param {number} value 0 to 1 */
export function formatPercent(value) {
  const percent = value * 100;
  if (percent >= 99.95 && value < 1) return `>99.9${THIN_SPACE}%`;
  if (percent >= 10) return `${percent.toFixed(1)}${THIN_SPACE}%`;
  if (percent >= 1e-4) return `${Number(percent.toPrecision(2))}${THIN_SPACE}%`;
  return `${percent > 0 ? percent.toExponential(0) : "0"}${THIN_SPACE}%`;
}

/** Return a number of things, such as "1 token". @param {number} count @param {string} noun */
export function formatThings(count, noun) {
  return `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Return a duration with its unit. @param {number} seconds */
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1e-3) return `${formatNumber(seconds * 1e6)}${THIN_SPACE}µs`;
  if (seconds < 1) return `${formatNumber(seconds * 1e3)}${THIN_SPACE}ms`;
  if (seconds < 120) return `${formatNumber(seconds)}${THIN_SPACE}s`;
  return `${formatNumber(seconds / 60)}${THIN_SPACE}min`;
}

/**
 * Return a token's text with its white space visible.
 * @param {string} text
 */
export function visibleText(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}
