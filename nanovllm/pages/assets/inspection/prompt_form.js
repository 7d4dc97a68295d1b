/** The form above the views of one prompt: the prompt, where it can come from, and its errors. */

import { busy, button, errorMessage, field } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";

const MAX_NAME_CHARACTERS = 40;
// Fits into the default context of a trained model, 64 tokens, also if a token is a character.
const EXAMPLE = "It was the best of times, it was the worst of times, it was";

/**
 * Return a form that computes and shows something of a prompt.
 *
 * `compute` returns the element to show; a new prompt aborts the computation of the last one.
 * @param {{context: import("../inspector/main.js").Context, action: string, hint: string,
 *   compute: (prompt: string, signal: AbortSignal) => Promise<Node>}} options
 */
export function promptForm({ context, action, hint, compute }) {
  const input = h("textarea", { class: "input", rows: 2, spellcheck: "false", value: EXAMPLE });
  const result = h("div", { class: "v-output" });
  /** @type {AbortController | null} */
  let running = null;
  let handedOver = "";
  let hasShown = false;

  async function run() {
    const prompt = input.value;
    running?.abort();
    if (!prompt) {
      running = null;
      result.removeAttribute("aria-busy");
      replace(result, errorMessage("The prompt is empty. Enter a prompt."));
      return;
    }
    const controller = new AbortController();
    running = controller;
    hasShown = true;
    if (!result.childElementCount) replace(result, busy("Computing the forward pass"));
    result.setAttribute("aria-busy", "true");
    try {
      replace(result, await compute(prompt, controller.signal));
      result.dataset.prompt = prompt;
      context.announce(`${action}: done`);
    } catch (/** @type {any} */ error) {
      if (controller.signal.aborted) return;
      replace(result, errorMessage(error.message));
    }
    if (running === controller) result.removeAttribute("aria-busy");
  }

  const recent = button(
    "Use the playground's text",
    { small: true, kind: "quiet", hidden: true },
    () => {
      input.value = context.store.get("prompt");
      run();
    },
  );
  context.store.subscribe("prompt", (prompt) => (recent.hidden = !prompt));
  const finished = h("select", {
    class: "select v-number",
    hidden: true,
    "aria-label": "Prompt of a finished request",
    onchange: () => {
      input.value = finished.value;
      finished.value = "";
      run();
    },
  });
  context.store.subscribe("finished", (requests) => {
    finished.hidden = !requests?.length;
    replace(
      finished,
      h("option", { value: "", text: "Finished requests" }),
      (requests ?? []).map((/** @type {{name: string, prompt: string}} */ { name, prompt }) =>
        h("option", { value: prompt, text: `${name} ${prompt.slice(0, MAX_NAME_CHARACTERS)}` }),
      ),
    );
  });
  const submit = button(action, { kind: "primary", type: "submit" });
  const form = h("form", { class: "card stack v-prompt" }, [
    field({ label: "Prompt", control: input, hint }),
    h("div", { class: "row" }, [submit, recent, finished]),
  ]);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run();
  });
  return {
    element: h("div", { class: "stack" }, form, result),
    /** Compute another prompt. @param {string} prompt */
    run(prompt) {
      input.value = prompt;
      submit.focus(); // what had the focus may be replaced
      run();
    },
    /** Compute the prompt that another view has handed over, or at first the example. */
    show() {
      const prompt = context.store.get("prompt");
      const isNew = Boolean(prompt) && prompt !== handedOver;
      if (isNew) input.value = handedOver = prompt;
      if (isNew || !hasShown) run();
    },
  };
}
