/** Buttons, fields and messages. */

import { h, s, uniqueId } from "./dom.js";

/** @type {Record<string, string>} */
const ICONS = {
  play: "M5 3.5v9l7.5-4.5z",
  pause: "M4.5 3.5h2.5v9H4.5zM9 3.5h2.5v9H9z",
  stop: "M4 4h8v8H4z",
  step: "M3.5 3.5v9L10 8zM11 3.5h2v9h-2z",
  back: "M12.5 3.5v9L6 8zM3 3.5h2v9H3z",
  plus: "M7.25 3h1.5v4.25H13v1.5H8.75V13h-1.5V8.75H3v-1.5h4.25z",
  close: "M4.1 3 8 6.9 11.9 3 13 4.1 9.1 8l3.9 3.9-1.1 1.1L8 9.1 4.1 13 3 11.9 6.9 8 3 4.1z",
  key:
    "M10.5 2a3.5 3.5 0 0 0-3.35 4.5L2 11.65V14h2.35l.9-.9v-1.35H6.6l2.9-2.9A3.5 3.5 0 1 0 10.5 2" +
    "zm1 2a1 1 0 1 1 0 2 1 1 0 0 1 0-2z",
  sun:
    "M8 5a3 3 0 1 1 0 6 3 3 0 0 1 0-6zM7.3 1h1.4v2H7.3zM7.3 13h1.4v2H7.3zM1 7.3h2v1.4H1z" +
    "M13 7.3h2v1.4h-2zM2.6 3.6l1-1 1.4 1.4-1 1zM11 12l1-1 1.4 1.4-1 1zM2.6 12.4 4 11l1 1-1.4 1.4z" +
    "M11 4l1.4-1.4 1 1L12 5z",
  moon: "M6.2 2a5.6 5.6 0 0 0 7.6 7.4A6.2 6.2 0 1 1 6.2 2z",
  copy: "M5 2h8v9h-2v3H3V5h2zm1.5 1.5V5H11v4.5h.5v-6zM4.5 6.5v6h5v-6z",
  search:
    "M7 2a5 5 0 0 1 4 8l3 3-1 1-3-3a5 5 0 1 1-3-9zm0 1.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7" + "z",
  branch:
    "M4 2a2 2 0 0 1 .75 3.85v4.3a2 2 0 1 1-1.5 0v-4.3A2 2 0 0 1 4 2zm8 0a2 2 0 0 1 .75 3.85" +
    "C12.6 8.6 10.6 9.4 6.5 9.5V8c3.3-.1 4.6-.5 4.75-2.15A2 2 0 0 1 12 2z",
  info:
    "M8 1.5a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13zM8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3zm-.75 4h1.5" +
    "v4.5h-1.5zm0-2.5h1.5V6h-1.5z",
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
 * @param {string} label
 * @param {{icon?: string, iconOnly?: boolean, small?: boolean,
 *   kind?: "primary" | "quiet" | "danger" | "", [attribute: string]: any}} [options]
 * @param {(event: MouseEvent) => void} [onclick]
 * @returns {HTMLButtonElement}
 */
export function button(label, options = {}, onclick) {
  const { icon: name, iconOnly, kind = "", small, ...attributes } = options;
  const classes = ["button", kind, small && "small", iconOnly && "icon-only"].filter(Boolean);
  const named = iconOnly ? { "aria-label": label, title: label } : {};
  return h("button", { class: classes.join(" "), ...named, onclick, ...attributes }, [
    name && icon(name),
    !iconOnly && h("span", { class: "button-label", text: label }),
  ]);
}

/**
 * Return a section with a title. `lead` is the text below it, `beside` what is in its line.
 * @param {string} title
 * @param {{lead?: string, beside?: Node, [attribute: string]: any}} options
 * @param {any[]} children
 */
export function card(title, { lead, beside, class: name = "", ...attributes }, children) {
  const heading = h("h2", { text: title });
  return h("section", { class: `card ${name}`, "aria-label": title, ...attributes }, [
    beside ? h("div", { class: "card-header" }, heading, beside) : heading,
    lead && h("p", { class: "secondary v-lead", text: lead }),
    children,
  ]);
}

/**
 * Return a labelled field around an input, select or textarea.
 * @param {{label: string, control: any, hint?: string, unit?: string, hideLabel?: boolean}} options
 */
export function field({ label, control, hint, unit, hideLabel }) {
  control.id ||= uniqueId("field");
  const hintId = hint ? uniqueId("hint") : null;
  if (hintId) control.setAttribute("aria-describedby", hintId);
  return h("div", { class: "stack field" }, [
    h("label", { for: control.id, class: hideLabel ? "visually-hidden" : "field-label" }, [
      label,
      unit && h("span", { class: "field-unit", text: ` ${unit}` }),
    ]),
    control,
    hint && h("span", { class: "field-hint", id: hintId, text: hint }),
  ]);
}

/**
 * Return a segmented control: a group of radio buttons, so the arrow keys work.
 * @param {{label: string, options: {value: string, label: string}[], value: string,
 *   onchange: (value: string) => void}} options
 */
export function segmented({ label, options, value, onchange }) {
  const name = uniqueId("segment");
  return h("div", { class: "segmented", role: "radiogroup", "aria-label": label }, [
    options.map((option) =>
      h("label", { class: "segment" }, [
        h("input", {
          type: "radio",
          name,
          value: option.value,
          checked: option.value === value,
          onchange: () => onchange(option.value),
        }),
        h("span", { text: option.label }),
      ]),
    ),
  ]);
}

/**
 * Return a list of items with a share each, as a bar and as a text.
 * @template T
 * @param {T[]} items
 * @param {(item: T) => number} shareOf from 0 to 1
 * @param {(share: number) => string} format
 * @param {(item: T) => Node} nameOf
 */
export function shareList(items, shareOf, format, nameOf) {
  const rows = items.map((item) => [
    nameOf(item),
    h("span", { class: "share-bar", vars: { "--part": shareOf(item) } }),
    h("span", { text: format(shareOf(item)) }),
  ]);
  return h("ol", { class: "share-list" }, [...rows.map((row) => h("li", {}, row))]);
}

/**
 * Return what a view shows where it has nothing to show yet.
 * @param {{title: string, text: string, action?: Node}} options
 */
export function emptyState({ title, text, action }) {
  return h("div", { class: "stack empty-state" }, [
    h("p", { class: "empty-title", text: title }),
    h("p", { class: "empty-text", text }),
    action,
  ]);
}

/**
 * Return a token in its word, of which the rest is grey.
 * @param {import("./format.js").Word} word
 */
export function tokenInWord({ before, token, after }) {
  const rest = (/** @type {string} */ text) => text && h("span", { class: "word-rest", text });
  return h("code", {}, rest(before), h("span", { class: "word-token", text: token }), rest(after));
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
    list = h("div", { class: "stack toasts", role: "status", "aria-live": "polite" });
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
    const isCopied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    if (!isCopied) {
      toast(`The browser does not allow this page to copy the ${what}.`, "error");
      return;
    }
  }
  toast(`Copied the ${what}.`);
}
