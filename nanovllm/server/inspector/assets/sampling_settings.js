/** The settings of a request: fields of /v1/completions. An empty field is left out. */

import { field } from "./components.js";
import { append, h } from "./dom.js";

/**
 * @typedef {{name: string, label: string, kind: "number" | "checkbox" | "lines" | "ids" | "bias" |
 *   "text" | "json", min?: number, max?: number, step?: number | "any", value?: string,
 *   hint?: string, placeholder?: string}} Setting
 */

/** @type {{title: string, isOpen?: boolean, settings: Setting[]}[]} */
const SECTIONS = [
  {
    title: "Sampling",
    isOpen: true,
    settings: [
      { name: "temperature", label: "Temperature", kind: "number", min: 0, max: 2, step: 0.1 },
      { name: "top_p", label: "Top-p", kind: "number", min: 0, max: 1, step: 0.05 },
      { name: "top_k", label: "Top-k", kind: "number", min: -1, step: 1 },
      { name: "min_p", label: "Min-p", kind: "number", min: 0, max: 1, step: 0.01 },
      { name: "seed", label: "Seed", kind: "number", step: 1, placeholder: "random" },
      { name: "logprobs", label: "Alternatives", kind: "number", min: 0, max: 20, value: "10",
        placeholder: "none" },
    ],
  },
  {
    title: "Length",
    isOpen: true,
    settings: [
      { name: "max_tokens", label: "Max. tokens", kind: "number", min: 1, step: 1, value: "64",
        placeholder: "16" },
      { name: "n", label: "Choices", kind: "number", min: 1, max: 8, step: 1, placeholder: "1" },
      { name: "min_tokens", label: "Min. tokens", kind: "number", min: 0, step: 1,
        placeholder: "0" },
      { name: "ignore_eos", label: "Ignore the end of text", kind: "checkbox" },
    ],
  },
  {
    title: "Penalties",
    settings: [
      { name: "repetition_penalty", label: "Repetition", kind: "number", min: 0, step: 0.1 },
      { name: "presence_penalty", label: "Presence", kind: "number", min: -2, max: 2, step: 0.1,
        placeholder: "0" },
      { name: "frequency_penalty", label: "Frequency", kind: "number", min: -2, max: 2, step: 0.1,
        placeholder: "0" },
    ],
  },
  {
    title: "Stop",
    settings: [
      { name: "stop", label: "Stop strings", kind: "lines", hint: "One a line; \\n is a newline.",
        placeholder: "none" },
      { name: "stop_token_ids", label: "Stop token ids", kind: "ids", placeholder: "none",
        hint: "Separated by commas or spaces." },
      { name: "include_stop_str_in_output", label: "Keep the stop string", kind: "checkbox" },
    ],
  },
  {
    title: "Tokens",
    settings: [
      { name: "logit_bias", label: "Logit bias", kind: "bias", placeholder: "none",
        hint: "A token id and a bias a line, such as 13: -5." },
      { name: "bad_words", label: "Banned texts", kind: "lines", hint: "One a line.",
        placeholder: "none" },
      { name: "allowed_token_ids", label: "Allowed token ids", kind: "ids", placeholder: "all" },
    ],
  },
  {
    title: "Request",
    settings: [
      { name: "priority", label: "Priority", kind: "number", step: 1, placeholder: "0",
        hint: "Lower runs first." },
      { name: "truncate_prompt_tokens", label: "Truncate prompt", kind: "number", min: -1,
        placeholder: "no" },
      { name: "cache_salt", label: "Cache salt", kind: "text", placeholder: "none",
        hint: "Prefixes are shared within a salt." },
      { name: "extra", label: "Other fields", kind: "json",
        placeholder: "none", hint: 'A JSON object, such as {"structured_outputs": {…}}.' },
    ],
  },
];

/** What is wrong with a field that cannot be read. */
export class SettingError extends Error {}

/**
 * Return the settings: their element, the fields of a request, and their values as texts.
 */
export function createSettings() {
  /** @type {Map<string, {setting: Setting, control: any}>} */
  const controls = new Map();
  const element = h("div", { class: "settings" });
  for (const { title, isOpen, settings } of SECTIONS) {
    const grid = h("div", { class: "settings-grid" });
    for (const setting of settings) {
      const control = createControl(setting);
      controls.set(setting.name, { setting, control });
      append(grid, [labelled(setting, control)]);
    }
    const summary = h("summary", { class: "settings-title", text: title });
    element.append(h("details", { class: "settings-section", open: isOpen }, summary, grid));
  }
  return {
    element,
    /** Return the fields of a request; throws SettingError. */
    fields() {
      const fields = {};
      for (const { setting, control } of controls.values()) {
        control.removeAttribute("aria-invalid");
        try {
          Object.assign(fields, readSetting(setting, control));
        } catch (error) {
          this.mark(setting.name);
          throw new SettingError(`${setting.label}: ${error.message}`);
        }
      }
      return fields;
    },
    /** Show the model's defaults in empty fields. @param {Record<string, number>} defaults */
    showDefaults(defaults) {
      for (const [name, value] of Object.entries(defaults)) {
        const text = name === "top_k" && value <= 0 ? `${value} (all)` : String(value);
        controls.get(name)?.control.setAttribute("placeholder", text);
      }
    },
    /** Mark the field that an error is about. @param {string | null} name */
    mark(name) {
      const control = controls.get(name ?? "")?.control;
      if (!control) return;
      control.setAttribute("aria-invalid", "true");
      control.closest("details").open = true;
    },
    /** Return the values as the user entered them. */
    values() {
      const entries = [...controls].map(([name, { setting, control }]) => [
        name, setting.kind === "checkbox" ? control.checked : control.value,
      ]);
      return Object.fromEntries(entries);
    },
    /** Enter values. @param {Record<string, any>} values of `values()` */
    restore(values) {
      for (const [name, { setting, control }] of controls) {
        if (setting.kind === "checkbox") control.checked = values[name];
        else control.value = values[name];
      }
    },
  };
}

/** @param {Setting} setting */
function createControl(setting) {
  const { name, kind, min, max, step, value = "", placeholder } = setting;
  if (kind === "checkbox") return h("input", { type: "checkbox", name });
  if (kind === "lines" || kind === "bias" || kind === "json") {
    const attributes = { class: "textarea mono", rows: 2, spellcheck: "false" };
    return h("textarea", { ...attributes, name, placeholder, value });
  }
  if (kind !== "number") return h("input", { type: "text", class: "input", name, placeholder });
  const shown = placeholder ?? "default";
  const attributes = { type: "number", class: "input", inputmode: "decimal", step: step ?? 1 };
  return h("input", { ...attributes, name, min, max, placeholder: shown, value });
}

/**
 * @param {Setting} setting
 * @param {any} control
 */
function labelled(setting, control) {
  if (setting.kind === "checkbox") {
    return h("label", { class: "checkbox wide" }, control, h("span", { text: setting.label }));
  }
  const element = field({ label: setting.label, control, hint: setting.hint });
  if (setting.kind !== "number") element.classList.add("wide");
  return element;
}

/**
 * Return the fields of a request that a setting stands for, none if it is empty.
 * @param {Setting} setting
 * @param {any} control
 */
function readSetting(setting, control) {
  const { name, kind } = setting;
  if (kind === "checkbox") return control.checked ? { [name]: true } : {};
  if (control.validity.badInput) throw new Error("enter a number");
  if (control.value.trim() === "") return {};
  if (kind === "number") return { [name]: Number(control.value) };
  if (kind === "lines") return { [name]: lines(control.value) };
  if (kind === "ids") return { [name]: control.value.match(/[^\s,]+/g).map(toInteger) };
  if (kind === "bias") return { [name]: Object.fromEntries(lines(control.value).map(toBias)) };
  return kind === "json" ? toObject(control.value) : { [name]: control.value };
}

/** @param {string} text */
function lines(text) {
  const escapes = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (escape) => escapes[escape]));
}

/** @param {string} text */
function toInteger(text) {
  if (!/^\d+$/.test(text)) throw new Error(`${text} is no token id`);
  return Number(text);
}

/** @param {string} line such as "13: -5" */
function toBias(line) {
  const match = /^\s*(\d+)\s*[:=\s]\s*([-+.\de]+)\s*$/i.exec(line);
  if (!match || !Number.isFinite(Number(match[2]))) throw new Error(`${line} is no id and bias`);
  return [match[1], Number(match[2])];
}

/** @param {string} text */
function toObject(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`this is no JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error("enter a JSON object");
  }
  return value;
}
