/**
 * The colours of style.css for canvases. They change with the theme, which dispatches
 * "themechange" on the document.
 */

/** @type {WeakMap<Element, () => void>} */
const redraws = new WeakMap();

/**
 * Call `redraw` when the theme changes, as long as something else keeps the element alive.
 * @param {Element} element
 * @param {() => void} redraw
 */
export function onThemeChange(element, redraw) {
  redraws.set(element, redraw);
  listenForTheme(new WeakRef(element));
}

/** @param {WeakRef<Element>} reference */
function listenForTheme(reference) {
  document.addEventListener("themechange", function listener() {
    const element = reference.deref();
    if (element) redraws.get(element)?.();
    else document.removeEventListener("themechange", listener);
  });
}

/** Return the value of a CSS custom property. @param {string} name such as "--accent" */
export function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Number of colours of the categorical palette, `--cat-0` and so on. */
const NUM_CATEGORIES = 8;
/** Number of stops of the sequential scale, `--seq-0` and so on. */
const NUM_STOPS = 9;

/** Return the colour of a request or other category by its number. @param {number} index */
export function categoricalColor(index) {
  return token(`--cat-${index % NUM_CATEGORIES}`);
}

/**
 * Return the red, green and blue of the sequential scale as 256 × 3 bytes, for images on a canvas.
 */
export function sequentialTable() {
  const stops = Array.from({ length: NUM_STOPS }, (_, index) => rgb(token(`--seq-${index}`)));
  const table = new Uint8ClampedArray(256 * 3);
  for (let index = 0; index < 256; index += 1) {
    const position = (index / 255) * (NUM_STOPS - 1);
    const low = Math.min(Math.floor(position), NUM_STOPS - 2);
    for (let channel = 0; channel < 3; channel += 1) {
      const [from, to] = [stops[low][channel], stops[low + 1][channel]];
      table[index * 3 + channel] = Math.round(from + (to - from) * (position - low));
    }
  }
  return table;
}

/**
 * Return the sequential scale as a function from 0 to 1 to a CSS colour.
 * @returns {(fraction: number) => string}
 */
export function colorScale() {
  const table = sequentialTable();
  return (fraction) => {
    const at = Math.round(Math.min(Math.max(fraction, 0), 1) * 255) * 3;
    return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
  };
}

/**
 * Return the scale of signed numbers as a function from -1 to 1 to red, green and blue.
 * @returns {(fraction: number) => number[]}
 */
export function signedScale() {
  const [low, zero, high] = ["low", "zero", "high"].map((name) => rgb(token(`--signed-${name}`)));
  return (fraction) => {
    const end = fraction < 0 ? low : high;
    const part = Math.min(Math.abs(fraction), 1);
    return zero.map((from, channel) => Math.round(from + (end[channel] - from) * part));
  };
}

/** @param {string} hex such as "#4f46e5" */
function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}
