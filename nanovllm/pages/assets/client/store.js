/**
 * Values that views share, with subscriptions.
 *
 * Keys of the page: `health` ("ready", "locked" without the API key, "loading", "unreachable"),
 * `model` (name), `maxModelLen` (tokens), `samplingDefaults` (values of fields that a
 * request leaves out), `hasChatTemplate` (whether chats are answered, null until it is known),
 * `isPaused` (the engine), `prompt` (the text that the Playground hands to Attention and Logit
 * lens), `finished` (prompts of finished requests, for these), `engineRequest` (the request that
 * the Playground hands to Engine).
 *
 * @typedef {ReturnType<typeof createStore>} Store
 */

/**
 * Return a store of these values.
 * @param {Record<string, any>} values
 */
export function createStore(values) {
  const current = { ...values };
  /** @type {Map<string, Set<(value: any) => void>>} */
  const listeners = new Map();
  return {
    /** @param {string} key */
    get: (key) => current[key],
    /**
     * Set a value and call the listeners of its key if it changed.
     * @param {string} key
     * @param {any} value
     */
    set(key, value) {
      if (Object.is(current[key], value)) return;
      current[key] = value;
      for (const listener of listeners.get(key) ?? []) listener(value);
    },
    /**
     * Call `listener` now and after each change. Return a function that ends the subscription.
     * @param {string} key
     * @param {(value: any) => void} listener
     */
    subscribe(key, listener) {
      const others = listeners.get(key) ?? new Set();
      listeners.set(key, others.add(listener));
      listener(current[key]);
      return () => others.delete(listener);
    },
  };
}
