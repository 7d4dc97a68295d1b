/** Selects the request of a link from the Playground, or says why it has no row. */

import { findEngineId, shortId } from "../client/request_ids.js";
import { h } from "../elements/dom.js";

/** @import { Names, State } from "./replay.js" */

/**
 * @param {{store: import("../client/store.js").Store,
 *   names: Names,
 *   choose: (id: string) => void}} options
 */
export function requestLookup({ store, names, choose }) {
  const note = h("p", { class: "message", role: "status", hidden: true });
  /** @type {import("../client/request_ids.js").PromptOfRequest | null} */
  let wanted = null;
  let hasNewFrame = false;
  return {
    element: note,
    /** Take the request of the link. Frames of an earlier visit do not have it. */
    begin() {
      wanted = store.get("engineRequest") ?? null;
      store.set("engineRequest", null);
      hasNewFrame = false;
      note.hidden = true;
    },
    isPending: () => wanted !== null,
    /** Note that a frame has come since `begin`. */
    addFrame() {
      hasNewFrame = true;
    },
    /** Select the request, once a new state is shown. @param {State} state */
    finish(state) {
      if (!wanted || !hasNewFrame) return;
      const id = findEngineId(names.ids(), wanted);
      const hasRow = state.requests.some((request) => request.id === id);
      if (hasRow && id) choose(id);
      note.hidden = hasRow;
      note.textContent = id ? endedText(names.name(id), id) : unknownText(wanted, state);
      wanted = null;
      if (!hasRow) note.scrollIntoView({ block: "center" });
    },
  };
}

/** @param {string} name @param {string} id */
function endedText(name, id) {
  return `${name} (${shortId(id)}) has ended. Steps and Events below have what is recorded of it.`;
}

/** @param {import("../client/request_ids.js").PromptOfRequest} wanted @param {State} state */
function unknownText({ id, numPrompts }, { requests_omitted: omitted, can_control: canControl }) {
  if (omitted) return `${shortId(id)} is not among the requests that are listed.`;
  const hint = canControl ? " To follow a request, pause the engine, generate, and step." : "";
  const what = numPrompts > 1 ? `A prompt of ${shortId(id)}` : shortId(id);
  return (
    `${what} has ended. Requests are recorded while this view is open, here or in another ` +
    `window.${hint}`
  );
}
