/** Unfinished requests as rows: phase, progress, blocks, age, and why a request waits. */

import { formatCount, formatDuration, h } from "./dom.js";

const PHASE_TEXTS = {
  prefill: "prefill", decode: "decode", queued: "waiting", preempted: "preempted", blocked: "blocked",
};

/**
 * Return the list. A row keeps its element while its request is unfinished.
 * @param {{names: ReturnType<typeof import("./replay.js").createNames>, onSelect: (id: string) => void}} options
 */
export function requestList({ names, onSelect }) {
  const element = h("ul", { class: "v-requests", "aria-label": "Unfinished requests" });
  /** @type {Map<string, ReturnType<typeof requestRow>>} */
  const rows = new Map();
  let selected = null;
  return {
    element,
    /** @param {any} state */
    update(state) {
      const keys = new Set();
      state.requests.forEach((request, index) => {
        const key = `${request.id} ${request.choice}`;
        keys.add(key);
        if (!rows.has(key)) rows.set(key, requestRow(names, request, onSelect));
        const row = rows.get(key);
        row.update(request, selected);
        if (element.children[index] !== row.element) element.insertBefore(row.element, element.children[index]);
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
  };
}

function requestRow(names, { id, choice }, onSelect) {
  const phase = h("span", { class: "badge" });
  const age = h("span", { class: "v-age" });
  const numbers = h("span", { class: "v-numbers secondary" });
  const reason = h("p", { class: "v-reason", hidden: true });
  const prompt = h("p", { class: "v-request-prompt secondary", hidden: true });
  const parts = ["cached", "computed", "pending", "generated"].map((part) =>
    h("span", { class: `v-part v-part-${part}` }));
  const bar = h("span", { class: "v-progress", role: "img" }, parts);
  const button = h(
    "button",
    { type: "button", class: "v-request", title: id, onclick: () => onSelect(id),
      vars: { "--owner": `var(--cat-${names.color(id)})` } },
    h("span", { class: "v-name", text: names.name(id, choice) }), phase, bar, numbers, age,
  );
  const element = h("li", {}, button, prompt, reason);
  const set = (target, text) => {
    if (target.textContent !== text) target.textContent = text;
  };
  const mark = (selected) => {
    button.setAttribute("aria-pressed", String(selected === id));
    element.classList.toggle("v-faded", selected !== null && selected !== id);
  };
  return {
    element,
    mark,
    update(request, selected) {
      set(phase, PHASE_TEXTS[request.phase] ?? request.phase);
      phase.className = `badge v-phase-${request.phase}`;
      set(age, formatDuration(request.age_s));
      set(numbers, describe(request));
      setProgress(parts, bar, request);
      reason.hidden = !request.reason;
      if (request.reason) set(reason, sentence(names.shorten(request.reason), request.state));
      prompt.hidden = !request.prompt;
      if (request.prompt) set(prompt, request.prompt);
      mark(selected);
    },
  };
}

function setProgress(parts, bar, request) {
  const { prompt_tokens: prompt, computed_tokens: computed, output_tokens: output } = request;
  const cached = Math.min(request.reused_tokens, computed, prompt);
  const done = Math.min(computed, prompt) - cached;
  const widths = [cached, done, prompt - cached - done, output];
  const total = Math.max(prompt + request.max_tokens, 1);
  widths.forEach((tokens, index) => (parts[index].style.width = `${(100 * tokens) / total}%`));
  bar.setAttribute("aria-label", `${cached} prompt tokens cached, ${done} computed, `
    + `${prompt - cached - done} not computed, ${output} of at most ${request.max_tokens} generated`);
}

function describe({ prompt_tokens: prompt, computed_tokens: computed, output_tokens: output, ...request }) {
  const parts = [`${formatCount(Math.min(computed, prompt))}/${formatCount(prompt)} prompt`];
  if (request.reused_tokens) parts.push(`${formatCount(request.reused_tokens)} cached`);
  parts.push(`${formatCount(output)}/${formatCount(request.max_tokens)} generated`);
  parts.push(`${formatCount(request.num_blocks)} ${request.num_blocks === 1 ? "block" : "blocks"}`);
  if (request.preemptions) parts.push(`preempted ${request.preemptions} ×`);
  if (request.priority) parts.push(`priority ${request.priority}`);
  return parts.join(" · ");
}

/** Return a reason of the server, a clause without subject, as a sentence. */
function sentence(reason, state) {
  const text = /^[a-z]/.test(reason) ? reason[0].toUpperCase() + reason.slice(1) : reason;
  const why = state === "waiting" && !/^(Waits|Preempted)/.test(text) ? `Waits: ${reason}` : text;
  return /[.!]$/.test(why) ? why : `${why}.`;
}
