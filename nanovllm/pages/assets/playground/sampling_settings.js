/** The settings of a request: fields of /v1/completions. An empty field is left out. */

import { button, field } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { readText } from "./setting_values.js";

const ONE_COLUMN = "(max-width: 1023px)"; // as in playground.css

/**
 * @typedef {{name: string, label: string, kind: "number" | "slider" | "checkbox" | "lines" |
 *   "ids" | "bias" | "text" | "json" | "schema" | "regex" | "choice", min?: number, max?: number,
 *   step?: number | "any", value?: string, hint?: string, placeholder?: string}} Setting
 */

/** @type {{title: string | null, settings: Setting[]}[]} the first section is always open */
const SECTIONS = [
  {
    title: null,
    settings: [
      { name: "temperature", label: "Temperature", kind: "slider", min: 0, max: 2, step: 0.1 },
      { name: "top_p", label: "Top-p", kind: "slider", min: 0, max: 1, step: 0.05 },
      {
        name: "max_tokens",
        label: "Max. tokens",
        kind: "number",
        min: 1,
        step: 1,
        value: "64",
        placeholder: "as many as fit",
      },
      { name: "seed", label: "Seed", kind: "number", step: 1, placeholder: "random" },
      { name: "n", label: "Choices", kind: "number", min: 1, max: 8, step: 1, placeholder: "1" },
      {
        name: "logprobs",
        label: "Alternatives",
        kind: "number",
        min: 0,
        max: 20,
        value: "10",
        placeholder: "none",
      },
    ],
  },
  {
    title: "More sampling",
    settings: [
      { name: "top_k", label: "Top-k", kind: "number", min: -1, step: 1 },
      { name: "min_p", label: "Min-p", kind: "number", min: 0, max: 1, step: 0.01 },
      {
        name: "min_tokens",
        label: "Min. tokens",
        kind: "number",
        min: 0,
        step: 1,
        placeholder: "0",
      },
      { name: "ignore_eos", label: "Ignore the end of text", kind: "checkbox" },
    ],
  },
  {
    title: "Penalties",
    settings: [
      { name: "repetition_penalty", label: "Repetition", kind: "number", min: 0, step: 0.1 },
      {
        name: "presence_penalty",
        label: "Presence",
        kind: "number",
        min: -2,
        max: 2,
        step: 0.1,
        placeholder: "0",
      },
      {
        name: "frequency_penalty",
        label: "Frequency",
        kind: "number",
        min: -2,
        max: 2,
        step: 0.1,
        placeholder: "0",
      },
    ],
  },
  {
    title: "Stop",
    settings: [
      {
        name: "stop",
        label: "Stop strings",
        kind: "lines",
        hint: "One a line; \\n is a newline.",
        placeholder: "none",
      },
      {
        name: "stop_token_ids",
        label: "Stop token ids",
        kind: "ids",
        placeholder: "none",
        hint: "Separated by commas or spaces.",
      },
      { name: "include_stop_str_in_output", label: "Keep the stop string", kind: "checkbox" },
    ],
  },
  {
    title: "Structured output",
    settings: [
      {
        name: "json_schema",
        label: "JSON schema",
        kind: "schema",
        placeholder: "none",
        hint: 'Such as {"type": "object", "properties": {…}}. Fill in one of the three.',
      },
      { name: "regex", label: "Regular expression", kind: "regex", placeholder: "none" },
      {
        name: "choice",
        label: "One of these texts",
        kind: "choice",
        placeholder: "none",
        hint: "One a line.",
      },
    ],
  },
  {
    title: "Tokens",
    settings: [
      {
        name: "logit_bias",
        label: "Logit bias",
        kind: "bias",
        placeholder: "none",
        hint: "A token id and a bias a line, such as 13: -5.",
      },
      {
        name: "bad_words",
        label: "Banned texts",
        kind: "lines",
        hint: "One a line.",
        placeholder: "none",
      },
      { name: "allowed_token_ids", label: "Allowed token ids", kind: "ids", placeholder: "all" },
    ],
  },
  {
    title: "Request",
    settings: [
      {
        name: "priority",
        label: "Priority",
        kind: "number",
        step: 1,
        placeholder: "0",
        hint: "Lower runs first.",
      },
      {
        name: "truncate_prompt_tokens",
        label: "Truncate prompt",
        kind: "number",
        min: -1,
        placeholder: "no",
      },
      {
        name: "cache_salt",
        label: "Cache salt",
        kind: "text",
        placeholder: "none",
        hint: "Prefixes are shared within a salt.",
      },
      {
        name: "extra",
        label: "Other fields",
        kind: "json",
        placeholder: "none",
        hint: 'A JSON object, such as {"echo": true}.',
      },
    ],
  },
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
  const groups = SECTIONS.map(({ title, settings }) => {
    const fields = settings
      .filter(({ name }) => !skipped.includes(name))
      .map((setting) => {
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
function createControl(setting) {
  const { name, kind, min, max, step, value = "", placeholder } = setting;
  if (kind === "checkbox") return h("input", { type: "checkbox", name });
  if (["lines", "bias", "json", "schema", "choice"].includes(kind)) {
    const attributes = { class: "textarea mono", rows: 2, spellcheck: "false" };
    return h("textarea", { ...attributes, name, placeholder, value });
  }
  if (kind === "ids" || kind === "text" || kind === "regex") {
    return h("input", { type: "text", class: "input", name, placeholder });
  }
  const shown = placeholder ?? "default";
  const attributes = { type: "number", class: "input", inputmode: "decimal", step: step ?? 1 };
  return h("input", { ...attributes, name, min, max, placeholder: shown, value });
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
