/**
 * Calls of the server's API.
 *
 * Addresses are relative to the page, so that a proxy's path prefix works. The API key is a
 * variable of this module: it is sent to this server only, and a reload forgets it.
 */

/** @type {string | null} */
let apiKey = null;
/** @type {(() => Promise<string | null>) | null} */
let askForKey = null;
/** @type {Promise<string | null> | null} */
let keyQuestion = null;
/** Whether the last question was answered without a key: only the user's own calls ask again. */
let wasDeclined = false;
/** Called with whether the engine was paused when a response began. @type {(is: any) => void} */
let onPaused = () => {};

/** An error response of the server, or `status` 0 where the server cannot be reached. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   * @param {string | null} param the field of the request that the error is about
   */
  constructor(status, message, param = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
  }
}

/**
 * Set what is called when the server answers 401. It returns the key, or null for none.
 * @param {() => Promise<string | null>} ask
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/**
 * Set what is called with each response: whether the engine was paused when it began.
 * @param {(isPaused: boolean) => void} listener
 */
export function onPause(listener) {
  onPaused = listener;
}

/** @param {string | null} key */
export function setKey(key) {
  apiKey = key || null;
  wasDeclined = apiKey === null;
}

/** Return whether a key has been entered. */
export function hasKey() {
  return apiKey !== null;
}

/** Return the address of a path on this server, such as "v1/completions". @param {string} path */
export function address(path) {
  return new URL(path.replace(/^\//, ""), document.baseURI.replace(/#.*$/, "")).href;
}

/**
 * GET JSON.
 * @param {string} path
 * @param {{signal?: AbortSignal, isBackground?: boolean, isCacheable?: boolean}} [options] a call
 *   that the user did not start does not ask for a key again; a cacheable response is stored by the
 *   browser, which asks the server whether it has changed
 */
export async function get(path, { signal, isBackground, isCacheable } = {}) {
  const cache = isCacheable ? "no-cache" : "no-store";
  return (await send(path, { signal, cache }, isBackground)).json();
}

/**
 * POST JSON and return the JSON of the response.
 * @param {string} path
 * @param {object} body
 * @param {{signal?: AbortSignal}} [options]
 */
export async function post(path, body, options = {}) {
  return (await send(path, postInit(body, options.signal))).json();
}

/**
 * Yield the server-sent events of a response, in lists of those that arrived together.
 *
 * EventSource cannot send a key, so the response is read here. `[DONE]` ends the stream.
 * @param {string} path
 * @param {{body?: object, signal?: AbortSignal, isBackground?: boolean}} [options] as for `get`;
 *   with a body it is a POST
 * @returns {AsyncGenerator<{event: string, data: any}[]>}
 */
export async function* stream(path, options = {}) {
  const init = options.body ? postInit(options.body, options.signal) : { signal: options.signal };
  const response = await send(path, init, options.isBackground);
  const reader = /** @type {ReadableStream} */ (response.body)
    .pipeThrough(new TextDecoderStream())
    .getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = parts.pop() ?? "";
      const events = parts.map(parseEvent).filter((event) => event.data !== null);
      const end = events.findIndex((event) => event.data === "[DONE]");
      const kept = (end < 0 ? events : events.slice(0, end)).map((event) => ({
        event: event.event,
        data: JSON.parse(event.data ?? ""),
      }));
      const failed = kept.find((event) => event.data.error);
      if (failed) throw toError(failed.data.error.code, failed.data);
      if (kept.length) yield kept;
      if (end >= 0) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {string} text one event's lines */
function parseEvent(text) {
  let event = "message";
  const data = [];
  for (const line of text.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return { event, data: data.length ? data.join("\n") : null };
}

/**
 * @param {object} body
 * @param {AbortSignal | undefined} signal
 */
function postInit(body, signal) {
  return {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  };
}

/**
 * Return a successful response; ask for a key on 401 and try again.
 * @param {string} path
 * @param {RequestInit} init
 * @param {boolean} [isBackground]
 */
async function send(path, init, isBackground) {
  for (;;) {
    const usedKey = apiKey;
    const headers = new Headers(init.headers);
    if (usedKey) headers.set("authorization", `Bearer ${usedKey}`);
    /** @type {RequestInit} */
    const request = { cache: "no-store", ...init, headers, credentials: "omit" };
    let response;
    try {
      response = await fetch(address(path), request);
    } catch (/** @type {any} */ error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError(0, "The server cannot be reached.");
    }
    onPaused(response.headers.get("x-nanovllm-engine") === "paused");
    if (response.ok) return response;
    const error = toError(response.status, await response.json().catch(() => null));
    if (response.status !== 401 || !askForKey) throw error;
    if (apiKey !== usedKey) continue; // entered meanwhile
    if (isBackground && wasDeclined && !keyQuestion) throw error;
    keyQuestion ??= askForKey().finally(() => (keyQuestion = null));
    setKey(await keyQuestion);
    if (!apiKey) throw error;
  }
}

/**
 * @param {number} status
 * @param {{error?: {message: string, param: string | null}} | null} body
 */
function toError(status, body) {
  const message = body?.error?.message ?? `The server answered with status ${status}.`;
  return new ApiError(status, message, body?.error?.param ?? null);
}
