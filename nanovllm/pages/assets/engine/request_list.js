/** Unfinished requests as rows: phase, progress, tokens, blocks, age, and why a request waits. */

import { shortId } from "../client/request_ids.js";
import { button as actionButton } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { formatCount, formatDuration, formatThings } from "../elements/format.js";

/** @import { Names, Request } from "./replay.js" */

/** @type {Record<string, string>} */
const PHASE_TEXTS = {
  prefill: "prefill",
  decode: "decode",
  queued: "waiting",
  preempted: "preempted",
  blocked: "blocked",
};
const INSPECTING_VIEWS = { attention: "Attention", lens: "Logit lens" };
const COLUMNS = [
  { name: "prompt", label: "Prompt", title: "prompt tokens computed or cached, and all" },
  { name: "output", label: "Generated", title: "tokens generated, and the maximum" },
  { name: "blocks", label: "Blocks", title: "KV cache blocks that the request holds" },
  { name: "age", label: "Age", title: "time since the request arrived" },
];

/**
 * Return a list of the requests in a state. A listed request keeps its row.
 * @param {Request["state"]} state
 * @param {{names: Names, onSelect: (id: string) => void,
 *   inspect: (view: string, prompt: string) => void}} options `inspect` opens a view with a prompt
 */
export function requestList(state, { names, onSelect, inspect }) {
  const label = `${state === "running" ? "Running" : "Waiting"} requests`;
  const list = h("ul", { class: "stack v-requests", "aria-label": label });
  const header = h("div", { class: "bare v-request v-request-header", "aria-hidden": "true" }, [
    h("span", { text: "Request" }),
    h("span", { text: "Phase" }),
    h("span", { text: "Progress" }),
    COLUMNS.map(({ label: text, title }) => h("span", { class: "v-cell", text, title })),
  ]);
  const element = h("div", { class: "v-request-list" }, header, list);
  /** @type {Map<string, ReturnType<typeof requestRow>>} */
  const rows = new Map();
  /** @type {string | null} */
  let selected = null;
  return {
    element,
    /** @param {Request[]} requests @param {number} pausedS time to add to their ages */
    update(requests, pausedS) {
      const shown = requests.filter((request) => request.state === state);
      const keys = new Set();
      element.hidden = shown.length === 0;
      shown.forEach((request, index) => {
        const key = `${request.id} ${request.choice}`;
        keys.add(key);
        const row = rows.get(key) ?? requestRow(names, request, onSelect, inspect);
        rows.set(key, row);
        row.update({ ...request, age_s: request.age_s + pausedS }, selected);
        if (list.children[index] !== row.element)
          list.insertBefore(row.element, list.children[index]);
      });
      for (const [key, row] of rows) {
        if (keys.has(key)) continue;
        row.element.remove();
        rows.delete(key);
      }
    },
    /** @param {string | null} id */
    select(id) {
      selected = id;
      for (const row of rows.values()) row.mark(id);
    },
    /** Scroll the selected row into view, and focus it. */
    reveal() {
      /** @type {HTMLElement | null} */
      const row = list.querySelector("[aria-pressed='true']");
      row?.scrollIntoView({ block: "center" });
      row?.focus({ preventScroll: true });
    },
  };
}

/**
 * @param {Names} names
 * @param {Request} request
 * @param {(id: string) => void} onSelect
 * @param {(view: string, prompt: string) => void} inspect
 */
function requestRow(names, { id, choice, prompt: text }, onSelect, inspect) {
  const phase = h("span", { class: "badge" });
  const cells = COLUMNS.map(({ label, title }) =>
    h("span", { class: "v-cell", title, dataset: { label } }),
  );
  const reason = h("p", { class: "v-reason", hidden: true });
  const prompt = h("p", { class: "v-request-prompt secondary ellipsis", hidden: true });
  const parts = ["cached", "computed", "pending", "generated"].map((part) =>
    h("span", { class: `v-part v-part-${part}` }),
  );
  const bar = h("span", { class: "v-progress", role: "img" }, parts);
  const button = h(
    "button",
    {
      class: "bare v-request",
      title: id,
      onclick: () => onSelect(id),
      vars: { "--owner": `var(--cat-${names.color(id)})` },
    },
    h("span", { class: "v-title" }, [
      h("span", { class: "v-name", text: names.name(id, choice) }),
      h("code", { class: "v-id ellipsis", text: shortId(id) }),
    ]),
    phase,
    bar,
    cells,
  );
  const actions = h("div", { class: "row v-request-actions", hidden: true }, [
    Object.entries(INSPECTING_VIEWS).map(([view, label]) =>
      actionButton(label, { small: true }, () => inspect(view, text ?? "")),
    ),
    h("span", {
      class: "secondary small-text",
      text: "of at most the first 200 characters of the prompt",
    }),
  ]);
  const element = h("li", {}, button, prompt, reason, actions);
  /** @param {HTMLElement} target @param {string} text */
  const set = (target, text) => {
    if (target.textContent !== text) target.textContent = text;
  };
  /** @param {string | null} selected */
  const mark = (selected) => {
    button.setAttribute("aria-pressed", String(selected === id));
    element.classList.toggle("v-faded", selected !== null && selected !== id);
    actions.hidden = selected !== id || !text;
  };
  return {
    element,
    mark,
    /** @param {Request} request @param {string | null} selected */
    update(request, selected) {
      const again = request.preemptions ? ` ×${request.preemptions}` : "";
      set(phase, (PHASE_TEXTS[request.phase] ?? request.phase) + again);
      phase.className = `badge v-phase-${request.phase}`;
      phase.title = again && `preempted ${formatThings(request.preemptions, "time")}`;
      for (const [index, text] of textsOf(request).entries()) set(cells[index], text);
      setProgress(parts, bar, request);
      reason.hidden = !request.reason;
      if (request.reason) set(reason, names.sentence(request.reason));
      prompt.hidden = !request.prompt;
      if (request.prompt) set(prompt, request.prompt);
      mark(selected);
    },
  };
}

/** @param {Request} request */
function textsOf({ prompt_tokens: prompt, computed_tokens: computed, ...request }) {
  return [
    `${formatCount(Math.min(computed, prompt))} / ${formatCount(prompt)}`,
    `${formatCount(request.output_tokens)} / ${formatCount(request.max_tokens)}`,
    formatCount(request.num_blocks),
    formatDuration(request.age_s),
  ];
}

/** @param {HTMLElement[]} parts @param {HTMLElement} bar @param {Request} request */
function setProgress(parts, bar, request) {
  const { prompt_tokens: prompt, computed_tokens: computed, output_tokens: output } = request;
  const cached = Math.min(request.reused_tokens, computed, prompt);
  const done = Math.min(computed, prompt) - cached;
  const widths = [cached, done, prompt - cached - done, output];
  const total = Math.max(prompt + request.max_tokens, 1);
  for (const [index, tokens] of widths.entries()) {
    parts[index].style.width = `${(100 * tokens) / total}%`;
  }
  bar.setAttribute(
    "aria-label",
    `${cached} prompt tokens cached, ${done} computed, ` +
      `${prompt - cached - done} pending, ${output} of at most ${request.max_tokens} generated`,
  );
}
