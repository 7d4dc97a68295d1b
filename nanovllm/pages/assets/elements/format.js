/**
 * Numbers with their units, and tokens, as text.
 *
 * @typedef {{id: number, text: string, bytes?: string}} Token of /v1/inspect; `bytes` in hexadecimal
 *   where they are no UTF-8
 * @typedef {{before: string, token: string, after: string}} Word a token in the word around it
 */

const NARROW_SPACE = "\u202F";
const MAX_NEIGHBORS = 4; // tokens of a word that are shown on each side of one of them

/** Return an integer with thin spaces between thousands. @param {number} value */
export function formatCount(value) {
  return Math.round(value)
    .toString()
    .replace(/\B(?=(\d{3})+$)/g, NARROW_SPACE);
}

/** Return a number with so many significant digits. @param {number} value */
export function formatNumber(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 10 ** digits) return formatCount(value);
  return Number(value.toPrecision(digits)).toString().replace("-", "−");
}

/**
 * Return a number with at most so many significant digits: 0.0003, 21400, 3e-5.
 * @param {number} value
 * @param {number} [digits]
 */
export function shortNumber(value, digits = 5) {
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(digits));
  if (size === 0 || (size >= 1e-4 && size < 1e15)) return String(rounded);
  return rounded.toExponential().replace("e+", "e");
}

/**
 * Return a large number in three digits with a suffix: 12.3M; below 10,000 a whole number.
 * @param {number} value
 */
export function formatCompact(value) {
  const unit = [1e12, 1e9, 1e6, 1e3].find(
    (one) => Math.abs(value) >= Math.max(one * 0.9995, 10_000 * 0.99995),
  ); // 999,950 is 1.00M, not 1000k
  if (!unit) return formatCount(value);
  const scaled = value / unit;
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(1, Math.abs(scaled) * 1.0005))));
  return scaled.toFixed(digits) + "kMBT"[Math.log10(unit) / 3 - 1];
}

/** Return a duration in its two largest units: 1 h 02 min. @param {number} seconds */
export function formatElapsed(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const two = (/** @type {number} */ number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  const minutes = Math.round(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${two(minutes % 60)} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Return a probability in percent; small ones keep two digits. @param {number} value 0 to 1 */
export function formatPercent(value) {
  const percent = value * 100;
  if (percent >= 99.95 && value < 1) return `>99.9${NARROW_SPACE}%`;
  if (percent >= 10) return `${percent.toFixed(1)}${NARROW_SPACE}%`;
  if (percent >= 1e-4) return `${Number(percent.toPrecision(2))}${NARROW_SPACE}%`;
  return `${percent > 0 ? percent.toExponential(0) : "0"}${NARROW_SPACE}%`;
}

/** Return a number of things, such as "1 token". @param {number} count @param {string} noun */
export function formatThings(count, noun) {
  return `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Return a duration with its unit. @param {number} seconds */
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1e-3) return `${formatNumber(seconds * 1e6)}${NARROW_SPACE}µs`;
  if (seconds < 1) return `${formatNumber(seconds * 1e3)}${NARROW_SPACE}ms`;
  if (seconds < 120) return `${formatNumber(seconds)}${NARROW_SPACE}s`;
  return `${formatNumber(seconds / 60)}${NARROW_SPACE}min`;
}

const CONTROL = /(?![\n\t])\p{Cc}/gu;
const INVISIBLE = /(?! )[\p{Cf}\p{Co}\p{Cs}\p{Z}]/gu;

/**
 * Return a text whose control characters, but white space, are escapes such as "\x1F".
 * @param {string} text
 */
export function escapeControls(text) {
  return text.replace(CONTROL, escapeCharacter);
}

/**
 * Return a text whose invisible characters, but spaces, are signs or escapes.
 * @param {string} text
 */
export function readableText(text) {
  const escaped = escapeControls(text).replace(INVISIBLE, escapeCharacter);
  return escaped.replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** @param {string} character */
function escapeCharacter(character) {
  const code = character.codePointAt(0) ?? 0;
  return code < 0x80 ? escapedBytes([code]) : `\\u{${code.toString(16).toUpperCase()}}`;
}

/**
 * Return a text in one line, with its spaces and other invisible characters visible.
 * @param {string} text
 */
export function visibleText(text) {
  return readableText(text).replaceAll(" ", "␣") || "∅";
}

/** Return bytes as escapes, such as "\xE2\x80". @param {Iterable<number>} bytes */
export function escapedBytes(bytes) {
  const digits = (/** @type {number} */ byte) => byte.toString(16).toUpperCase().padStart(2, "0");
  return Array.from(bytes, (byte) => `\\x${digits(byte)}`).join("");
}

/**
 * Return a token of /v1/inspect in one line: its text, or its bytes if they are not valid UTF-8.
 * @param {{text: string, bytes?: string}} token
 */
export function tokenLabel({ text, bytes }) {
  if (!bytes) return visibleText(text);
  return escapedBytes(Array.from(bytes.matchAll(/../g), ([digits]) => parseInt(digits, 16)));
}

/**
 * Return a token as a part of running text, where spaces between words stay spaces.
 * @param {{text: string, bytes?: string}} token
 */
export function tokenText(token) {
  return token.bytes || !token.text.trim() ? tokenLabel(token) : readableText(token.text);
}

/**
 * Return a token in the word that contains it: a word ends at white space.
 * @param {number} index of the token
 * @param {number} count number of tokens
 * @param {(index: number) => {text: string | null, label: string}} read a token's text, null if it
 *   is not valid UTF-8, and the token in one line
 * @returns {Word}
 */
export function wordAround(index, count, read) {
  const isJoined = (/** @type {number} */ left) =>
    left >= 0 &&
    left + 1 < count &&
    !/\s$/.test(read(left).text ?? "") &&
    !/^\s/.test(read(left + 1).text ?? "");
  let [first, last] = [index, index];
  while (isJoined(first - 1) && index - first < MAX_NEIGHBORS) first -= 1;
  while (isJoined(last) && last - index < MAX_NEIGHBORS) last += 1;
  const labels = (/** @type {number} */ from, /** @type {number} */ to) =>
    Array.from({ length: to - from }, (_, offset) => read(from + offset).label).join("");
  const start = isJoined(first - 1) ? "…" : "";
  return {
    before: first < index ? `${start}${labels(first, index).replace(/^␣+/, "")}` : start,
    token: read(index).label,
    after: `${labels(index + 1, last + 1)}${isJoined(last) ? "…" : ""}`,
  };
}
