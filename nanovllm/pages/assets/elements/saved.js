/**
 * What a reload keeps: prompts, settings and results, in the session storage of this tab.
 *
 * The browser forgets it with the tab. The API key is never stored.
 */

const PREFIX = "nanovllm.";
const DIGITS = 6; // of a stored number
/** Most characters of one value: browsers give an origin about 5 million. */
export const MAX_CHARACTERS = 1_500_000;

/**
 * Return what `read` makes of a stored value, or null without one that it can read.
 * @template T
 * @param {string} name
 * @param {(value: any) => T} read
 * @returns {T | null}
 */
export function load(name, read) {
  try {
    const text = sessionStorage.getItem(PREFIX + name);
    return text === null ? null : read(JSON.parse(text));
  } catch {
    return null;
  }
}

/**
 * Store a text of `write`; where the storage is full or forbidden, nothing is kept.
 * @param {string} name
 * @param {string} text
 */
export function store(name, text) {
  try {
    sessionStorage.setItem(PREFIX + name, text);
  } catch {
    forget(name);
  }
}

/** Forget a value. @param {string} name */
export function forget(name) {
  try {
    sessionStorage.removeItem(PREFIX + name);
  } catch {
    // No storage: nothing was kept.
  }
}

/** Return a value as JSON, with rounded numbers. @param {any} value */
export function write(value) {
  return JSON.stringify(value, (_, part) =>
    typeof part === "number" && !Number.isInteger(part) ? Number(part.toPrecision(DIGITS)) : part,
  );
}
