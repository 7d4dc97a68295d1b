/**
 * Elements. Text enters the page as text nodes: there is no HTML from strings.
 */

const SVG = "http://www.w3.org/2000/svg";
let lastId = 0;

/**
 * @typedef {Node | string | number | null | undefined | false} Leaf
 * @typedef {Leaf | any[]} Child a list may contain lists
 */

/**
 * Return an HTML element.
 *
 * Attributes: `class`, `text`, `dataset`, properties such as `value`, listeners (`onclick`),
 * and any other attribute; false, null and undefined leave one out. A button submits no form unless
 * its type says so. `vars` sets CSS custom
 * properties.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (element instanceof HTMLButtonElement) element.type = "button";
  return fill(element, attributes, children);
}

/**
 * Return an SVG element; see `h`.
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {SVGElementTagNameMap[Tag]}
 */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "indeterminate", "selected", "open"]);

/**
 * @param {any} element
 * @param {Record<string, any>} attributes
 * @param {Child[]} children
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
 * @param {Child[]} children
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
 * @param {...Child} children
 */
export function replace(parent, ...children) {
  parent.replaceChildren();
  append(parent, children);
}

/** Return the element of the page with an id. @param {string} id */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** Return the element below the pointer or with the focus. @param {Event} event */
export function targetOf(event) {
  return /** @type {HTMLElement} */ (event.target);
}

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * Return how far an arrow key moves, in rows down and columns to the right; null of another key.
 * @param {KeyboardEvent} event
 * @param {Record<string, [number, number]>} [others] moves of other keys
 */
export function keyMove(event, others = {}) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  return ARROWS[event.key] ?? others[event.key] ?? null;
}

/** Return an id that no other element has. @param {string} prefix */
export function uniqueId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/**
 * Make the arrow keys move the focus between the children that match, with one tab stop for all.
 * @param {HTMLElement} parent
 * @param {string} selector
 * @param {number} columns number of children in a row
 */
export function rovingFocus(parent, selector, columns = 1) {
  /** @param {string} matching @returns {HTMLElement[]} */
  const all = (matching) =>
    [...parent.querySelectorAll(matching)].map((each) => /** @type {any} */ (each));
  parent.addEventListener("focusin", (event) => {
    const target = /** @type {HTMLElement | null} */ (targetOf(event).closest(selector));
    if (!target) return;
    for (const item of all(`${selector}[tabindex="0"]`)) item.tabIndex = -1;
    target.tabIndex = 0;
  });
  parent.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement | null} */ (targetOf(event).closest(selector));
    const move = keyMove(event, { Home: [-Infinity, 0], End: [Infinity, 0] });
    if (!target || !move) return;
    event.preventDefault();
    const items = all(selector);
    const steps = move[0] * columns + move[1];
    const ends = { [-Infinity]: 0, [Infinity]: items.length - 1 };
    items[ends[steps] ?? items.indexOf(target) + steps]?.focus();
  });
}
