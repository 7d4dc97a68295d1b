/**
 * Elements and components. Text enters the page as text nodes: there is no HTML from strings.
 */

const SVG = "http://www.w3.org/2000/svg";
let lastId = 0;

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * Return an HTML element.
 *
 * Attributes: `class`, `text`, `dataset`, properties such as `value`, listeners (`onclick`),
 * and any other attribute; false, null and undefined leave one out. `vars` sets CSS custom
 * properties.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/**
 * Return an SVG element; see `h`.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "indeterminate", "selected", "open"]);

/**
 * @param {any} element
 * @param {Record<string, any>} attributes
 * @param {(Child | Child[])[]} children
 */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "vars") {
      for (const [key, of] of Object.entries(value)) element.style.setProperty(key, String(of));
    } else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

/**
 * @param {Element} parent
 * @param {(Child | Child[])[]} children
 */
export function append(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child instanceof Node ? child : String(child));
  }
}

/**
 * Replace all children of an element.
 * @param {Element} parent
 * @param {...(Child | Child[])} children
 */
export function replace(parent, ...children) {
  parent.replaceChildren();
  append(parent, children);
}

/** Return an id that no other element has. @param {string} prefix */
export function uniqueId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

const ICONS = {
  play: "M5 3.5v9l7.5-4.5z",
  pause: "M4.5 3.5h2.5v9H4.5zM9 3.5h2.5v9H9z",
  stop: "M4 4h8v8H4z",
  step: "M3.5 3.5v9L10 8zM11 3.5h2v9h-2z",
  back: "M12.5 3.5v9L6 8zM3 3.5h2v9H3z",
  plus: "M7.25 3h1.5v4.25H13v1.5H8.75V13h-1.5V8.75H3v-1.5h4.25z",
  close: "M4.1 3 8 6.9 11.9 3 13 4.1 9.1 8l3.9 3.9-1.1 1.1L8 9.1 4.1 13 3 11.9 6.9 8 3 4.1z",
  key: "M10.5 2a3.5 3.5 0 0 0-3.35 4.5L2 11.65V14h2.35l.9-.9v-1.35H6.6l2.9-2.9A3.5 3.5 0 1 0 10.5 2"
    + "zm1 2a1 1 0 1 1 0 2 1 1 0 0 1 0-2z",
  sun: "M8 5a3 3 0 1 1 0 6 3 3 0 0 1 0-6zM7.3 1h1.4v2H7.3zM7.3 13h1.4v2H7.3zM1 7.3h2v1.4H1z"
    + "M13 7.3h2v1.4h-2zM2.6 3.6l1-1 1.4 1.4-1 1zM11 12l1-1 1.4 1.4-1 1zM2.6 12.4 4 11l1 1-1.4 1.4z"
    + "M11 4l1.4-1.4 1 1L12 5z",
  moon: "M6.2 2a5.6 5.6 0 0 0 7.6 7.4A6.2 6.2 0 1 1 6.2 2z",
  copy: "M5 2h8v9h-2v3H3V5h2zm1.5 1.5V5H11v4.5h.5v-6zM4.5 6.5v6h5v-6z",
  search: "M7 2a5 5 0 0 1 4 8l3 3-1 1-3-3a5 5 0 1 1-3-9zm0 1.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7"
    + "z",
  branch: "M4 2a2 2 0 0 1 .75 3.85v4.3a2 2 0 1 1-1.5 0v-4.3A2 2 0 0 1 4 2zm8 0a2 2 0 0 1 .75 3.85"
    + "C12.6 8.6 10.6 9.4 6.5 9.5V8c3.3-.1 4.6-.5 4.75-2.15A2 2 0 0 1 12 2z",
  info: "M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13zM8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3zm-.75 4h1.5"
    + "v4.5h-1.5zm0-2.5h1.5V6h-1.5z",
  chevron: "M4.1 5.5 8 9.4l3.9-3.9L13 6.6l-5 5-5-5z",
  reset: "M8 3a5 5 0 1 1-4.9 6h1.6A3.5 3.5 0 1 0 8 4.5V7L4.2 3.8 8 .6z",
  up: "M8 3l5 5.2-1.1 1.1-3.15-3.2V13h-1.5V6.1L4.1 9.3 3 8.2z",
};

/** Return an icon; it is decoration, so its button needs a text or a label. @param {string} name */
export function icon(name) {
  const path = s("path", { d: ICONS[name], "fill-rule": "evenodd" });
  return s("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, path);
}

/**
 * Return a button. `label` is its text, or its accessible name with `iconOnly`.
 * @param {{label: string, icon?: string, iconOnly?: boolean, small?: boolean,
 *   kind?: "primary" | "quiet" | "danger" | "", onclick?: (event: MouseEvent) => void,
 *   [attribute: string]: any}} options
 * @returns {HTMLButtonElement}
 */
export function button({ label, icon: name, iconOnly, kind = "", small, ...attributes }) {
  const classes = ["button", kind, small && "small", iconOnly && "icon-only"].filter(Boolean);
  return h(
    "button",
    {
      type: "button",
      class: classes.join(" "),
      "aria-label": iconOnly ? label : null,
      title: iconOnly ? label : null,
      ...attributes,
    },
    name && icon(name),
    !iconOnly && h("span", { class: "button-label", text: label }),
  );
}

/**
 * Return a labelled field around an input, select or textarea.
 * @param {{label: string, control: any, hint?: string, unit?: string, hideLabel?: boolean}} options
 */
export function field({ label, control, hint, unit, hideLabel }) {
  control.id ||= uniqueId("field");
  const hintId = hint ? uniqueId("hint") : null;
  if (hintId) control.setAttribute("aria-describedby", hintId);
  return h(
    "div",
    { class: "field" },
    h(
      "label",
      { for: control.id, class: hideLabel ? "visually-hidden" : "field-label" },
      label,
      unit && h("span", { class: "field-unit", text: ` ${unit}` }),
    ),
    control,
    hint && h("span", { class: "field-hint", id: hintId, text: hint }),
  );
}

/**
 * Return a segmented control: a group of radio buttons, so the arrow keys work.
 * @param {{label: string, options: {value: string, label: string}[], value: string,
 *   onchange: (value: string) => void}} options
 */
export function segmented({ label, options, value, onchange }) {
  const name = uniqueId("segment");
  return h(
    "div",
    { class: "segmented", role: "radiogroup", "aria-label": label },
    options.map((option) =>
      h(
        "label",
        { class: "segment" },
        h("input", {
          type: "radio",
          name,
          value: option.value,
          checked: option.value === value,
          onchange: () => onchange(option.value),
        }),
        h("span", { text: option.label }),
      ),
    ),
  );
}

/**
 * Return what a view shows where it has nothing to show yet.
 * @param {{title: string, text: string, action?: Node}} options
 */
export function emptyState({ title, text, action }) {
  return h(
    "div",
    { class: "empty-state" },
    h("p", { class: "empty-title", text: title }),
    h("p", { class: "empty-text", text }),
    action,
  );
}

/** Return an error message that screen readers announce. @param {string} text */
export function errorMessage(text) {
  return h("p", { class: "message error", role: "alert", text });
}

/** Return a spinner with a text. @param {string} text */
export function busy(text) {
  return h("p", { class: "busy", role: "status" }, h("span", { class: "spinner" }), text);
}

/**
 * Show a short message at the bottom of the page.
 * @param {string} text
 * @param {"info" | "error"} [kind]
 */
export function toast(text, kind = "info") {
  let list = document.querySelector(".toasts");
  if (!list) {
    list = h("div", { class: "toasts", role: "status", "aria-live": "polite" });
    document.body.append(list);
  }
  const item = h("div", { class: `toast ${kind}`, text });
  list.append(item);
  setTimeout(() => item.remove(), 5000);
}

/**
 * Copy a text. The clipboard needs a secure context, which plain HTTP is on this machine only.
 * @param {string} text
 * @param {string} what for the message, such as "curl command"
 */
export async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "visually-hidden", value: text, "aria-hidden": "true" });
    const focused = /** @type {HTMLElement | null} */ (document.activeElement);
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
  toast(`Copied the ${what}.`);
}

// Tooltip and popover: one of each for the whole page.

/** @type {HTMLElement | null} */
let tooltip = null;
/** @type {Element | null} */
let tooltipAnchor = null;

/**
 * Show a tooltip at an element until `hideTooltip`, Escape or a scroll.
 * @param {Element | DOMRect} anchor
 * @param {...(Child | Child[])} content
 */
export function showTooltip(anchor, ...content) {
  if (!tooltip) {
    tooltip = h("div", { class: "tooltip", role: "tooltip", id: "tooltip" });
    document.body.append(tooltip);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());
    window.addEventListener("scroll", hideTooltip, { passive: true, capture: true });
  }
  replace(tooltip, ...content);
  tooltip.hidden = false;
  tooltipAnchor?.removeAttribute("aria-describedby");
  tooltipAnchor = anchor instanceof Element ? anchor : null;
  tooltipAnchor?.setAttribute("aria-describedby", "tooltip");
  place(tooltip, anchor instanceof Element ? anchor.getBoundingClientRect() : anchor);
}

/** Hide the tooltip. */
export function hideTooltip() {
  tooltipAnchor?.removeAttribute("aria-describedby");
  tooltipAnchor = null;
  if (tooltip) tooltip.hidden = true;
}

/** @type {(() => void) | null} */
let closePopover = null;

/**
 * Open a popover at an element. It closes on Escape, on a click elsewhere and on another popover.
 * Escape returns the focus to the element. Return the function that closes it.
 * @param {{anchor: HTMLElement, label: string, content: Child | Child[],
 *   onclose?: () => void}} options
 */
export function openPopover({ anchor, label, content, onclose }) {
  closePopover?.();
  hideTooltip();
  const attributes = { class: "popover", role: "dialog", "aria-label": label, tabindex: "-1" };
  const element = h("div", attributes, content);
  const away = (/** @type {Event} */ event) => {
    const target = /** @type {Node} */ (event.target);
    if (!element.contains(target) && !anchor.contains(target)) close(false);
  };
  const keys = (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") close(true);
    if (event.key === "Tab") keepFocus(element, event);
  };
  /** @param {boolean} returnFocus */
  function close(returnFocus) {
    if (closePopover !== finish) return;
    closePopover = null;
    document.removeEventListener("pointerdown", away, true);
    element.removeEventListener("keydown", keys);
    element.remove();
    anchor.removeAttribute("aria-expanded");
    if (returnFocus && anchor.isConnected) anchor.focus();
    onclose?.();
  }
  const finish = () => close(true);
  closePopover = finish;
  anchor.setAttribute("aria-expanded", "true");
  document.body.append(element);
  place(element, anchor.getBoundingClientRect());
  document.addEventListener("pointerdown", away, true);
  element.addEventListener("keydown", keys);
  (element.querySelector("[autofocus], button, input, a[href]") ?? element).focus();
  return finish;
}

/**
 * Keep the focus inside of an element.
 * @param {HTMLElement} element
 * @param {KeyboardEvent} event
 */
function keepFocus(element, event) {
  const stops = [...element.querySelectorAll("button:not(:disabled), input, a[href], select")];
  const first = /** @type {HTMLElement} */ (stops[0]);
  const last = /** @type {HTMLElement} */ (stops.at(-1));
  const edge = event.shiftKey ? first : last;
  if (!edge || document.activeElement !== edge) return;
  event.preventDefault();
  (event.shiftKey ? last : first).focus();
}

/**
 * Place a fixed element below an anchor, or above it where there is more room.
 * @param {HTMLElement} element
 * @param {DOMRect} anchor
 */
function place(element, anchor) {
  const gap = 6;
  const edge = 8;
  element.style.maxHeight = "";
  const { width, height } = element.getBoundingClientRect();
  const roomAbove = anchor.top - gap - edge;
  const roomBelow = innerHeight - anchor.bottom - gap - edge;
  const isBelow = height <= roomBelow || roomBelow >= roomAbove;
  const shownHeight = Math.min(height, Math.max(isBelow ? roomBelow : roomAbove, 120));
  if (shownHeight < height) element.style.maxHeight = `${shownHeight}px`;
  const top = isBelow ? anchor.bottom + gap : anchor.top - gap - shownHeight;
  const left = Math.min(Math.max(edge, anchor.left), Math.max(edge, innerWidth - width - edge));
  element.style.left = `${left}px`;
  element.style.top = `${top}px`;
}

/**
 * Make the arrow keys move the focus between the children that match, with one tab stop for all.
 * @param {HTMLElement} parent
 * @param {string} selector
 */
export function rovingFocus(parent, selector) {
  parent.addEventListener("focusin", (event) => {
    const target = /** @type {HTMLElement} */ (event.target).closest(selector);
    if (!target) return;
    for (const item of parent.querySelectorAll(`${selector}[tabindex="0"]`)) item.tabIndex = -1;
    target.tabIndex = 0;
  });
  parent.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target).closest(selector);
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const isEnd = event.key === "Home" || event.key === "End";
    if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!(event.key in moves) && !isEnd) return;
    const items = [...parent.querySelectorAll(selector)];
    const index = items.indexOf(target) + (moves[event.key] ?? 0);
    const next = isEnd ? items.at(event.key === "Home" ? 0 : -1) : items[index];
    event.preventDefault();
    next?.focus();
  });
}

// Colours are defined in style.css; canvases read them here. They change with the theme, which
// dispatches "themechange" on the document.

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
    if (element) redraws.get(element)();
    else document.removeEventListener("themechange", listener);
  });
}

/** Return the value of a CSS custom property. @param {string} name such as "--accent" */
export function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Number of colours of the categorical palette, `--cat-0` and so on. */
export const NUM_CATEGORIES = 8;
/** Number of stops of the sequential scale, `--seq-0` and so on. */
export const NUM_STOPS = 9;

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
 * Return a colour of the sequential scale.
 * @param {number} fraction from 0 to 1
 */
export function sequentialColor(fraction) {
  const table = sequentialTable();
  const index = Math.round(Math.min(Math.max(fraction, 0), 1) * 255) * 3;
  return `rgb(${table[index]} ${table[index + 1]} ${table[index + 2]})`;
}

/** @param {string} hex such as "#4f46e5" */
function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

// Numbers.

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
