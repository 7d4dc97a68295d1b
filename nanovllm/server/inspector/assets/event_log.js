/** The log of admissions, cache hits, preemptions and ends of requests, newest first. */

import { formatCount, h, replace } from "./dom.js";

const MAX_LINES = 60;

/**
 * Return the log.
 * @param {{names: ReturnType<typeof import("./replay.js").createNames>,
 *   onSelect: (id: string) => void, onWatch: (step: number) => void}} options
 */
export function eventLog({ names, onSelect, onWatch }) {
  const list = h("ol", { class: "v-log" });
  const empty = h("p", { class: "secondary", text: "Nothing has happened yet." });
  let drawn = "";
  let selected = null;
  let lines = [];

  function linesOf(record) {
    const line = (kind, id, text) => ({ step: record.step, kind, id, text });
    return [
      ...record.admitted.map((id) => line("admitted", id, "admitted")),
      ...record.cache_hits.map(({ id, tokens }) =>
        line("cache-hit", id, `found ${formatCount(tokens)} prompt tokens in the prefix cache`),
      ),
      ...record.preempted.map(({ id, reason }) => line("preempted", id, names.sentence(reason))),
      ...record.finished.map(({ id, reason }) => line("finished", id, `finished: ${reason}`)),
    ];
  }

  function render() {
    empty.hidden = lines.length > 0;
    replace(
      list,
      lines.map(({ step, kind, id, text }) =>
        h(
          "li",
          { class: selected && selected !== id ? "v-faded" : null },
          h("button", {
            type: "button",
            class: "v-log-step",
            text: formatCount(step),
            "aria-label": `Replay step ${step}`,
            onclick: () => onWatch(step),
          }),
          h("button", {
            type: "button",
            class: "v-name",
            text: names.name(id),
            title: id,
            vars: { "--owner": `var(--cat-${names.color(id)})` },
            onclick: () => onSelect(id),
          }),
          h("span", { class: `v-log-${kind}`, text }),
        ),
      ),
    );
  }

  return {
    element: h(
      "div",
      {},
      empty,
      h(
        "div",
        {
          class: "v-log-scroll",
          tabindex: 0,
          role: "region",
          "aria-label": "Events, newest first",
        },
        list,
      ),
    ),
    /** @param {any[]} records oldest first @param {number | null} watched */
    update(records, watched) {
      const newLines = [];
      for (let index = records.length - 1; index >= 0 && newLines.length < MAX_LINES; index -= 1) {
        if (watched === null || records[index].step <= watched)
          newLines.push(...linesOf(records[index]).reverse());
      }
      lines = newLines.slice(0, MAX_LINES);
      const key = `${lines.length} ${lines[0]?.step} ${lines.at(-1)?.step}`;
      if (key === drawn) return;
      drawn = key;
      render();
    },
    /** @param {string | null} id */
    select(id) {
      selected = id;
      render();
    },
  };
}
