/** The banner of every view while the engine is paused: why nothing goes on, and what ends it. */

import { button, toast } from "../elements/components.js";
import { byId, h } from "../elements/dom.js";

/**
 * Return the banner. It follows `isPaused` of the store.
 * @param {import("./main.js").Context} context
 */
export function pausedBanner({ api, store, announce }) {
  const resume = button(
    "Resume the engine",
    { icon: "play", kind: "primary", small: true },
    async () => {
      try {
        await api.post("v1/engine/control", { action: "resume" });
        store.set("isPaused", false);
        announce("The engine runs.");
      } catch (/** @type {any} */ error) {
        toast(error.message, "error");
      }
    },
  );
  const text = h("p", { text: "The engine is paused: no request of any client makes progress." });
  const element = h(
    "div",
    { class: "row paused-banner", role: "status", hidden: true },
    text,
    resume,
  );
  store.subscribe("isPaused", (isPaused) => {
    const hadFocus = element.contains(document.activeElement);
    element.hidden = !isPaused;
    if (element.hidden && hadFocus) byId("main").focus();
  });
  return element;
}
