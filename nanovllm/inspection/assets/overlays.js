/** The tooltip and the popover: one of each for the whole page. */

import { h, replace } from "./dom.js";

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
 *   onclose?: () => void, onkey?: (event: KeyboardEvent) => void}} options
 */
export function openPopover({ anchor, label, content, onclose, onkey }) {
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
    onkey?.(event);
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
  const stops = [
    ...element.querySelectorAll("button:not(:disabled, [tabindex='-1']), input, a[href], select"),
  ];
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
