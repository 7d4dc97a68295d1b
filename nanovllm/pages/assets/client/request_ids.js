/**
 * Ids of requests. A completion "cmpl-ID" runs in the engine as "NUMBER-cmpl-ID" for each of its
 * prompts, with "-CHOICE" at the end where a prompt has several choices.
 *
 * @typedef {{id: string, prompt: number, numPrompts: number, choice: number}} PromptOfRequest
 *   `prompt` is an index among the `numPrompts` prompts of the request
 */

const NUM_SHOWN = 8;

/** Return a random id for the field `request_id`, of the form that the server's own ids have. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return the start of an id, such as "cmpl-7435843f…". @param {string} id of API or engine */
export function shortId(id) {
  const name = id.replace(/^\d+-/, "");
  const length = name.indexOf("-") + 1 + NUM_SHOWN;
  return name.length > length ? `${name.slice(0, length)}…` : name;
}

/**
 * Return the engine's id of a completion's prompt and choice, or null if it is unknown.
 *
 * Prompts are told apart by their order. So all of them are unknown where one ended before the page
 * could see it. Where several requests have the id, it is that of the newest.
 * @param {Iterable<string>} engineIds
 * @param {PromptOfRequest} wanted
 */
export function findEngineId(engineIds, { id, prompt, numPrompts, choice }) {
  const names = [id, `${id}-${choice}`];
  const found = [...engineIds].filter((each) => names.includes(each.replace(/^\d+-/, "")));
  found.sort((first, second) => parseInt(first, 10) - parseInt(second, 10));
  return found.length < numPrompts ? null : found.at(prompt - numPrompts);
}
