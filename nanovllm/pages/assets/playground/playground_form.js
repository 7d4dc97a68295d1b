/** The form of the Playground: prompts, settings, and what is wrong with them. */

import { ApiError } from "../client/api.js";
import { fitMaxTokens } from "../client/lengths.js";
import { toast } from "../elements/components.js";
import { load, store as save, write } from "../elements/saved.js";
import { problemBox } from "./problem_box.js";
import { promptColumns } from "./prompt_columns.js";
import { linkOf, readLink } from "./run_link.js";
import { samplingSettings } from "./sampling_settings.js";

const NAME = "playground.form";
const FIRST_PROMPT = "She smiled and said";

/**
 * Return the form, which reads requests. A reload keeps what it contains.
 * @param {import("../inspector/main.js").Context} context
 */
export function playgroundForm({ api, store }) {
  const prompts = promptColumns();
  const settings = samplingSettings(store);
  const problem = problemBox();
  let isOffline = false;

  /** Return the prompts and settings as they are entered. */
  const values = () => ({ prompts: prompts.texts(), settings: settings.values() });

  /** Enter prompts and settings. @param {{prompts: string[], settings: Record<string, any>}} kept */
  function restore(kept) {
    prompts.replace(kept.prompts);
    settings.restore(kept.settings);
  }

  /** Show an error of the whole request, or none. @param {string | null} message */
  function fail(message) {
    isOffline = false;
    problem.show(message);
  }

  function openLink() {
    const linked = readLink(location.hash);
    if (!linked) return;
    history.replaceState(null, "", "#playground"); // a reload keeps what is changed from here on
    restore(linked);
    toast("The form is filled in from the link. Generate runs it.");
  }

  store.subscribe("health", (health) => {
    if (isOffline && health !== "unreachable") fail(null);
  });
  const isRestored = load(NAME, (kept) => {
    restore({ prompts: kept.prompts.map(String), settings: kept.settings });
    return true;
  });
  if (!isRestored) prompts.replace([FIRST_PROMPT]);
  openLink();
  window.addEventListener("hashchange", openLink);
  window.addEventListener("pagehide", () => save(NAME, write(values())));

  return {
    prompts,
    settings,
    problem: problem.element,
    values,
    restore,
    fail,
    /** Return what the prompts and settings are, to notice a change. */
    text: () => JSON.stringify(values()),
    /** Return the link of the form, or null if it is too long. @param {number} [seed] */
    link(seed) {
      const run = values();
      if (seed !== undefined) run.settings.seed = String(seed);
      return linkOf(run);
    },
    /**
     * Return the request without the fields about streaming, or null after showing an error.
     * @param {"generate" | "score"} mode
     * @returns {Record<string, any> | null}
     */
    read(mode) {
      const texts = prompts.texts();
      fail(null);
      const empty = texts.indexOf("");
      if (empty >= 0) {
        fail(texts.length === 1 ? "Enter a prompt." : `Prompt ${empty + 1} is empty.`);
        prompts.focus(empty);
        return null;
      }
      let fields;
      try {
        fields = settings.fields();
      } catch (/** @type {any} */ error) {
        fail(/** @type {Error} */ (error).message);
        return null;
      }
      const model = store.get("model");
      const prompt = texts.length === 1 ? texts[0] : texts;
      const common = { ...(model ? { model } : {}), prompt };
      if (mode === "generate") return { ...common, ...fields };
      const options = { echo: true, max_tokens: 0, return_token_ids: true };
      return { ...common, ...options, prompt_logprobs: fields.logprobs ?? 0 };
    },
    /**
     * Return a request whose output fits into the context.
     * @template {Record<string, any> | null} Body
     * @param {Body} body
     * @param {AbortSignal} [signal]
     * @returns {Promise<Body>}
     */
    async fitted(body, signal) {
      if (!body || body.echo) return body;
      const server = { api, maxModelLen: store.get("maxModelLen") };
      const inputs = [body.prompt].flat().map((prompt) => ({ prompt }));
      const limits = { wanted: body.max_tokens, truncated: body.truncate_prompt_tokens };
      return { ...body, max_tokens: await fitMaxTokens(server, inputs, limits, { signal }) };
    },
    /** Show why a request failed. @param {Error} error */
    failRequest(error) {
      fail(error.message);
      if (!(error instanceof ApiError)) return;
      settings.mark(error.param);
      isOffline = error.status === 0;
      if (isOffline) store.set("health", "unreachable");
    },
  };
}
