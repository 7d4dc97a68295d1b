/** The settings of a request: fields of /v1/completions. An empty field is left out. */

import { button, field } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { readText } from "./setting_values.js";

const ONE_COLUMN = "(max-width: 1023px)"; // as in playground.css

const PENALTY = { min: -2, max: 2, step: 0.1, placeholder: "0" };
const SCHEMA_HINT = 'Such as {"type": "object", "properties": {…}}. Fill in one of the three.';

/**
 * A field of a request: its kind of control, its name and its label.
 * @typedef {"number" | "slider" | "checkbox" | "lines" | "ids" | "bias" | "text" | "json" | "schema" |
 *   "regex" | "choice"} Kind
 * @typedef {{min?: number, max?: number, step?: number | "any", value?: string, hint?: string,
 *   placeholder?: string}} Options
 * @typedef {Options & {kind: Kind, name: string, label: string}} Setting
 */

/** @type {[string | null, [Kind, string, string, Options?][]][]} the first section is always open */
const SECTIONS = [
  [
    null,
    [
      ["slider", "temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
      ["slider", "top_p", "Top-p", { min: 0, max: 1, step: 0.05 }],
      [
        "number",
        "max_tokens",
        "Max. tokens",
        { min: 1, value: "64", placeholder: "as many as fit" },
      ],
      ["number", "seed", "Seed", { placeholder: "random" }],
      ["number", "n", "Choices", { min: 1, max: 8, placeholder: "1" }],
      ["number", "logprobs", "Alternatives", { min: 0, max: 20, value: "10", placeholder: "none" }],
    ],
  ],
  [
    "More sampling",
    [
      ["number", "top_k", "Top-k", { min: -1 }],
      ["number", "min_p", "Min-p", { min: 0, max: 1, step: 0.01 }],
      ["number", "min_tokens", "Min. tokens", { min: 0, placeholder: "0" }],
      ["checkbox", "ignore_eos", "Ignore the end of text"],
    ],
  ],
  [
    "Penalties",
    [
      ["number", "repetition_penalty", "Repetition", { min: 0, step: 0.1 }],
      ["number", "presence_penalty", "Presence", PENALTY],
      ["number", "frequency_penalty", "Frequency", PENALTY],
    ],
  ],
  [
    "Stop",
    [
      ["lines", "stop", "Stop strings", { hint: "One a line; \\n is a newline." }],
      ["ids", "stop_token_ids", "Stop token ids", { hint: "Separated by commas or spaces." }],
      ["checkbox", "include_stop_str_in_output", "Keep the stop string"],
    ],
  ],
  [
    "Structured output",
    [
      ["schema", "json_schema", "JSON schema", { hint: SCHEMA_HINT }],
      ["regex", "regex", "Regular expression"],
      ["choice", "choice", "One of these texts", { hint: "One a line." }],
    ],
  ],
  [
    "Tokens",
    [
      [
        "bias",
        "logit_bias",
        "Logit bias",
        { hint: "A token id and a bias a line, such as 13: -5." },
      ],
      ["lines", "bad_words", "Banned texts", { hint: "One a line." }],
      ["ids", "allowed_token_ids", "Allowed token ids", { placeholder: "all" }],
    ],
  ],
  [
    "Request",
    [
      ["number", "priority", "Priority", { placeholder: "0", hint: "Lower runs first." }],
      ["number", "truncate_prompt_tokens", "Truncate prompt", { min: -1, placeholder: "no" }],
      ["text", "cache_salt", "Cache salt", { hint: "Prefixes are shared within a salt." }],
      ["json", "extra", "Other fields", { hint: 'A JSON object, such as {"echo": true}.' }],
    ],
  ],
];

/** Values of the sampling fields; those that a preset leaves out are emptied. */
const PRESETS = {
  Defaults: {},
  Greedy: { temperature: "0" },
  Balanced: { temperature: "0.7", top_p: "0.95" },
  Creative: { temperature: "1", top_p: "0.95" },
};
const PRESET_FIELDS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
];

/**
 * Return the card of the settings: fields of a request, and their values as texts. It is folded
 * where the window has one column.
 * @param {import("../client/store.js").Store} store whose `samplingDefaults` empty fields show
 * @param {{skipped?: string[], before?: Node | null}} [options] names of settings to leave out, and
 *   what is above the settings
 */
export function samplingSettings(store, { skipped = [], before = null } = {}) {
  /** @type {Map<string, {setting: Setting, control: any, slider: any}>} */
  const controls = new Map();
  const groups = SECTIONS.map(([title, rows]) => {
    const fields = rows
      .filter(([, name]) => !skipped.includes(name))
      .map(([kind, name, label, options]) => {
        const setting = { kind, name, label, ...options };
        const control = createControl(setting);
        const slider = setting.kind === "slider" ? createSlider(setting, control) : null;
        controls.set(setting.name, { setting, control, slider });
        return labelled(setting, control, slider);
      });
    const grid = h("div", { class: "settings-grid" }, fields);
    const summary = h("summary", { class: "settings-title", text: title });
    return title ? h("details", { class: "settings-section" }, summary, grid) : grid;
  });
  const isOpen = !matchMedia(ONE_COLUMN).matches;
  const element = h("details", { class: "card side-card settings-card", open: isOpen }, [
    h("summary", { class: "settings-summary" }, h("h3", { text: "Settings" })),
    before,
    presets(set),
    groups,
  ]);

  /** Enter values as texts, and truths of checkboxes. @param {Record<string, any>} values */
  function set(values) {
    for (const [name, value] of Object.entries(values)) {
      const known = controls.get(name);
      if (!known) continue;
      const { setting, control, slider } = known;
      if (setting.kind === "checkbox") control.checked = value === true || value === "true";
      else control.value = String(value);
      slider?.follow();
    }
  }

  /** Mark the field that an error is about. @param {string | null} name */
  function mark(name) {
    const control = controls.get(name ?? "")?.control;
    control?.setAttribute("aria-invalid", "true");
    let section = control?.closest("details");
    while (section) {
      section.open = true;
      section = section.parentElement.closest("details");
    }
  }

  store.subscribe("samplingDefaults", (defaults) => {
    for (const [name, value] of Object.entries(defaults ?? {})) {
      const { control, slider } = controls.get(name) ?? {};
      const text = name === "top_k" && value <= 0 ? `${value} (all)` : String(value);
      control?.setAttribute("placeholder", text);
      slider?.follow();
    }
  });

  return {
    element,
    mark,
    /** Return the fields of a request; an error names the setting. @returns {Record<string, any>} */
    fields() {
      /** @type {Record<string, any>} */
      const fields = {};
      for (const { control } of controls.values()) control.removeAttribute("aria-invalid");
      for (const { setting, control } of controls.values()) {
        try {
          const read = readSetting(setting, control);
          if ("structured_outputs" in read && "structured_outputs" in fields) {
            throw new Error("fill in one kind of structured output only");
          }
          Object.assign(fields, read);
        } catch (/** @type {any} */ error) {
          mark(setting.name);
          throw new Error(`${setting.label}: ${/** @type {Error} */ (error).message}`);
        }
      }
      return fields;
    },
    /** Return the values as the user entered them. @returns {Record<string, any>} */
    values() {
      const entries = [...controls].map(([name, { setting, control }]) => [
        name,
        setting.kind === "checkbox" ? control.checked : control.value,
      ]);
      return Object.fromEntries(entries);
    },
    /** Replace all values; those left out are emptied. @param {Record<string, any>} values */
    restore(values) {
      set({ ...Object.fromEntries([...controls.keys()].map((name) => [name, ""])), ...values });
    },
  };
}

/** @param {(values: Record<string, string>) => void} choose */
function presets(choose) {
  const empty = Object.fromEntries(PRESET_FIELDS.map((name) => [name, ""]));
  const buttons = Object.entries(PRESETS).map(([label, values]) =>
    button(label, { small: true }, () => choose({ ...empty, ...values })),
  );
  const attributes = {
    class: "row presets",
    role: "group",
    "aria-label": "Presets of the sampling",
  };
  return h("div", attributes, buttons);
}

/** @param {Setting} setting */
function createControl({ name, kind, min, max, step = 1, value = "", placeholder }) {
  if (kind === "checkbox") return h("input", { type: "checkbox", name });
  const isNumber = kind === "number" || kind === "slider";
  const common = { name, value, placeholder: placeholder ?? (isNumber ? "default" : "none") };
  if (["lines", "bias", "json", "schema", "choice"].includes(kind)) {
    return h("textarea", { class: "textarea mono", rows: 2, spellcheck: "false", ...common });
  }
  const range = isNumber
    ? { type: "number", inputmode: "decimal", step, min, max }
    : { type: "text" };
  return h("input", { class: "input", ...range, ...common });
}

/**
 * Return a slider that moves with a number field; where that is empty it stands at the default.
 * @param {Setting} setting
 * @param {any} control
 */
function createSlider({ label, min, max, step }, control) {
  const slider = h("input", {
    type: "range",
    class: "slider",
    min,
    max,
    step,
    "aria-label": `${label}, slider`,
    oninput: () => (control.value = slider.value),
  });
  const follow = () => {
    slider.value = control.value || control.placeholder;
  };
  control.addEventListener("input", follow);
  return { element: slider, follow };
}

/**
 * @param {Setting} setting
 * @param {any} control
 * @param {any} slider
 */
function labelled(setting, control, slider) {
  if (setting.kind === "checkbox") {
    return h("label", { class: "checkbox wide" }, control, h("span", { text: setting.label }));
  }
  const element = field({ label: setting.label, control, hint: setting.hint });
  if (slider) {
    element.classList.add("slider-field");
    element.append(slider.element);
  }
  if (setting.kind !== "number") element.classList.add("wide");
  return element;
}

/**
 * Return the fields of a request that a setting stands for, none if it is empty.
 * @param {Setting} setting
 * @param {any} control
 * @returns {Record<string, any>}
 */
function readSetting({ name, kind }, control) {
  if (kind === "checkbox") return control.checked ? { [name]: true } : {};
  if (control.validity.badInput) throw new Error("enter a number");
  return readText(name, kind, control.value);
}
