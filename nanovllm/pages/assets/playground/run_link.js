/**
 * Links to a run: its prompts and settings in the fragment of the address, which a browser does not
 * send to the server. A link fills in the form and runs nothing. Whatever it contains becomes the
 * text of fields, never markup.
 */

import { MAX_PROMPTS } from "./prompt_columns.js";

const VIEW = "playground";
const MAX_CHARACTERS = 16_000; // that address bars, chats and mails leave whole

/**
 * Return the link of a run, or null if it would be too long.
 * @param {{prompts: string[], settings: Record<string, string | boolean>}} run
 */
export function linkOf({ prompts, settings }) {
  const entries = Object.entries(settings).filter(([, value]) => value);
  const parameters = new URLSearchParams([
    ...prompts.map((prompt) => ["prompt", prompt]),
    ...entries.map(([name, value]) => [name, String(value)]),
  ]);
  const link = `${location.href.replace(/#.*$/, "")}#${VIEW}?${parameters}`;
  return link.length <= MAX_CHARACTERS ? link : null;
}

/**
 * Return the run of a fragment, or null if it is none.
 * @param {string} hash such as "#playground?prompt=Once&seed=3"
 */
export function readLink(hash) {
  const start = `#${VIEW}?`;
  if (!hash.startsWith(start) || hash.length > MAX_CHARACTERS) return null;
  const parameters = new URLSearchParams(hash.slice(start.length));
  const prompts = parameters.getAll("prompt").slice(0, MAX_PROMPTS);
  if (!prompts.length) return null;
  parameters.delete("prompt");
  return { prompts, settings: Object.fromEntries(parameters) };
}
