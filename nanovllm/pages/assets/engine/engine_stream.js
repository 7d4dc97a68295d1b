/** The stream of the engine's events, opened again when it ends or fails. */

const RETRY_MS = 2000; // before the first new attempt; the time doubles
const MAX_RETRY_MS = 60_000;

/** Return whether a new attempt would fail as this one. @param {any} error */
function isRefused({ status }) {
  return status >= 400 && status < 500 && status !== 429;
}

/**
 * Follow the events until the signal aborts. `retry` opens the stream now, if it waits to be opened
 * again; after a refusal, nothing else does.
 * @param {{api: typeof import("../client/api.js"), signal: AbortSignal, onopen: () => Promise<void>,
 *   onevents: (events: {event: string, data: any}[]) => void,
 *   onfailure: (error: any, isFinal: boolean) => void}} options
 */
export function followEvents({ api, signal, onopen, onevents, onfailure }) {
  /** @type {(isBackground: boolean) => void} */
  let wake = () => {};

  async function follow() {
    let waitMs = RETRY_MS;
    let isBackground = false;
    while (!signal.aborted) {
      let isOpen = false;
      let isFinal = false;
      try {
        for await (const events of api.stream("v1/engine/events", { signal, isBackground })) {
          if (!isOpen) await onopen();
          isOpen = true;
          waitMs = RETRY_MS;
          onevents(events);
        }
      } catch (/** @type {any} */ error) {
        if (signal.aborted) return;
        isFinal = isRefused(error);
        onfailure(error, isFinal);
      }
      isBackground = await new Promise((resolve) => {
        wake = resolve;
        signal.addEventListener("abort", () => resolve(true), { once: true });
        if (!isFinal) setTimeout(resolve, waitMs, true);
      });
      waitMs = Math.min(2 * waitMs, MAX_RETRY_MS);
    }
  }

  follow();
  return { retry: (/** @type {boolean} */ isBackground) => wake(isBackground) };
}
