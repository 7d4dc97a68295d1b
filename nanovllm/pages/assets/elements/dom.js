/**
 * Elements. Text enters the page as text nodes: there is no HTML from strings.
 */

const SVG = "http://www.w3.org/2000/svg";
let lastId = 0;

/** @typedef {Node | string | number | null | undefined | false | Child[]} Child */

/**
 * Return an HTML element.
 *
 * Attributes: `class`, `text`, `dataset`, properties such as `value`, listeners (`onclick`),
 * and any other attribute; false, null and undefined leave one out. `vars` sets CSS custom
 * properties.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
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
  parent.addEventListener("focusin", (event) => {
    const target = /** @type {HTMLElement} */ (event.target).closest(selector);
    if (!target) return;
    for (const item of parent.querySelectorAll(`${selector}[tabindex="0"]`)) item.tabIndex = -1;
    target.tabIndex = 0;
  });
  parent.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target).closest(selector);
    const moves = { ArrowRight: 1, ArrowDown: columns, ArrowLeft: -1, ArrowUp: -columns };
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
