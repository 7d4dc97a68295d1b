/** How many tokens a request can generate: the context has room for prompt and output together. */

const encoder = new TextEncoder();

/**
 * Return `max_tokens` of a request: the wanted number, or as many tokens as fit if that is less or
 * none is wanted.
 *
 * Where the server does not count the tokens, or the prompt alone fills the context, it is the
 * wanted number: the request itself then fails with the server's reason.
 * @param {{api: typeof import("./api.js"), maxModelLen: number | null}} server
 * @param {Record<string, any>[]} inputs bodies for /tokenize: one for each prompt, or one of messages
 * @param {{wanted?: number, truncated?: number}} limits `truncated` is the maximum length of a
 *   prompt, whose beginning the server drops; 0 or less for no number
 * @param {{signal?: AbortSignal}} [options]
 * @returns {Promise<number | undefined>}
 */
export async function fitMaxTokens({ api, maxModelLen }, inputs, limits, options) {
  const { wanted, truncated = 0 } = limits;
  const numBytes = Math.max(...inputs.map((input) => encoder.encode(input.prompt).length));
  // A token has at least a byte. Messages have the text of the template, too.
  const isShort =
    inputs.every((input) => "prompt" in input) &&
    wanted !== undefined &&
    maxModelLen !== null &&
    numBytes + wanted <= maxModelLen;
  if (isShort) return wanted;
  let counted;
  try {
    counted = await Promise.all(inputs.map((body) => api.post("tokenize", body, options)));
  } catch {
    return wanted;
  }
  const kept = (/** @type {number} */ count) => Math.min(count, truncated > 0 ? truncated : count);
  const room = Math.min(...counted.map(({ count, max_model_len: most }) => most - kept(count)));
  return room < 1 ? wanted : Math.min(room, wanted ?? room);
}

/**
 * Return how a prompt that belongs to the page fits into the model's context: at most half of it
 * for the output.
 * @param {number | null} maxModelLen
 * @param {number} wanted tokens of the output
 */
export function sampleLengths(maxModelLen, wanted) {
  if (maxModelLen === null) return { max_tokens: wanted };
  const maxTokens = Math.max(1, Math.min(wanted, Math.floor(maxModelLen / 2)));
  return { max_tokens: maxTokens, truncate_prompt_tokens: Math.max(1, maxModelLen - maxTokens) };
}
