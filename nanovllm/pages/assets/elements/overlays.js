/**
 * The tooltip and the popover: one of both for the whole page. No tooltip opens beside a popover.
 *
 * @typedef {import("./dom.js").Child} Child
 */

import { h, replace } from "./dom.js";

const GAP_PX = 6; // between an anchor and its tooltip or popover
const EDGE_PX = 8; // between these and the edge of the window
const LEAST_HEIGHT_PX = 400; // of a popover that scrolls to stay outside of the box around it
const MIN_ROOM_PX = 80; // where a window has less room, a popover covers its anchor
const TOOLTIP_DISTANCE_PX = 200; // at most, from an anchor over the box around it
const POPOVER_DISTANCE_PX = 400;

/** @type {HTMLElement | null} */
let tooltip = null;
/** @type {Element | null} */
let tooltipAnchor = null;

/**
 * Show a tooltip at an element until `hideTooltip`, Escape or a scroll, unless a popover is open.
 * @param {Element | DOMRect} anchor
 * @param {...Child} content
 */
export function showTooltip(anchor, ...content) {
  if (closePopover) return;
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
  place(tooltip, anchor, TOOLTIP_DISTANCE_PX);
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
 * Open a popover at an element, and return the function that closes it. It also closes on Escape,
 * which returns the focus to the element, on a click elsewhere, with the next popover and with the
 * view.
 * @param {{anchor: HTMLElement, label: string, content: Child,
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
    window.removeEventListener("hashchange", leave);
    element.removeEventListener("keydown", keys);
    element.remove();
    anchor.removeAttribute("aria-expanded");
    if (returnFocus && anchor.isConnected) anchor.focus();
    onclose?.();
  }
  const leave = () => close(false); // the anchor's view is hidden
  const finish = () => close(true);
  closePopover = finish;
  anchor.setAttribute("aria-expanded", "true");
  document.body.append(element);
  place(element, anchor, POPOVER_DISTANCE_PX);
  document.addEventListener("pointerdown", away, true);
  window.addEventListener("hashchange", leave);
  element.addEventListener("keydown", keys);
  /** @type {HTMLElement | null} */
  const first = element.querySelector("[autofocus], button, input, a[href]");
  (first ?? element).focus();
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
 * Place a fixed element in the window, beside its anchor.
 *
 * Where there is room near the anchor, it stays outside of the box around the anchor, too: an
 * ancestor with the attribute `data-around`, such as the text of which the anchor is a token.
 * @param {HTMLElement} element
 * @param {Element | DOMRect} anchor
 * @param {number} maxDistance
 */
function place(element, anchor, maxDistance) {
  element.style.maxHeight = "";
  const size = element.getBoundingClientRect();
  // A token that continues on the next line has two boxes; the popover belongs to the first.
  const box = anchor instanceof Element ? anchor.getClientRects()[0] : anchor;
  const around = anchor instanceof Element ? anchor.closest("[data-around]") : null;
  const found =
    (around && besideBox(around.getBoundingClientRect(), box, size, maxDistance)) ??
    sides(box, box, size).find(({ height, isInside }) => isInside && height >= size.height) ??
    largest(box, size);
  if (found.height < size.height) element.style.maxHeight = `${found.height}px`;
  element.style.left = `${found.left}px`;
  element.style.top = `${found.top}px`;
}

/**
 * Return the first side of a box around the anchor that has room for most of an element and is near
 * the anchor, or null.
 * @param {DOMRect} around
 * @param {DOMRect} anchor
 * @param {DOMRect} size
 * @param {number} maxDistance
 */
function besideBox(around, anchor, size, maxDistance) {
  const least = Math.min(size.height, LEAST_HEIGHT_PX);
  /** @param {ReturnType<typeof sides>[number]} returnTypetypeofsidesnumber */
  const isNear = ({ height, isInside, distance }) =>
    isInside && height >= least && distance <= maxDistance;
  return sides(around, anchor, size).find(isNear) ?? null;
}

/**
 * Return the sides of a box where an element can be: below, above, right and left of it, on the
 * other axis at the anchor.
 * @param {DOMRect} box
 * @param {DOMRect} anchor
 * @param {DOMRect} size of the element
 */
function sides(box, anchor, { width, height }) {
  const left = clamp(anchor.left, innerWidth - width - EDGE_PX);
  const top = clamp(anchor.top, innerHeight - height - EDGE_PX);
  const below = box.bottom + GAP_PX;
  const roomBelow = Math.min(height, innerHeight - EDGE_PX - below);
  const roomAbove = Math.min(height, box.top - GAP_PX - EDGE_PX);
  const right = box.right + GAP_PX;
  const beside = { top, height: Math.min(height, innerHeight - 2 * EDGE_PX) };
  const before = box.left - GAP_PX - width;
  const above = box.top - GAP_PX - roomAbove;
  return [
    {
      left,
      top: below,
      height: roomBelow,
      isInside: below >= EDGE_PX,
      distance: below - anchor.bottom,
    },
    {
      left,
      top: above,
      height: roomAbove,
      isInside: box.top <= innerHeight,
      distance: anchor.top - above - roomAbove,
    },
    {
      ...beside,
      left: right,
      isInside: right + width <= innerWidth - EDGE_PX,
      distance: right - anchor.right,
    },
    {
      ...beside,
      left: before,
      isInside: before >= EDGE_PX,
      distance: anchor.left - before - width,
    },
  ];
}

/**
 * Return the place below or above the anchor, whichever is larger; the element scrolls there.
 * @param {DOMRect} anchor
 * @param {DOMRect} size
 */
function largest(anchor, size) {
  const [below, above] = sides(anchor, anchor, size);
  const best = below.height >= above.height ? below : above;
  if (best.height >= MIN_ROOM_PX) return best;
  return { ...best, top: EDGE_PX, height: Math.min(size.height, innerHeight - 2 * EDGE_PX) };
}

/** Return a coordinate that is inside of the window. @param {number} value @param {number} most */
function clamp(value, most) {
  return Math.max(EDGE_PX, Math.min(value, most));
}
