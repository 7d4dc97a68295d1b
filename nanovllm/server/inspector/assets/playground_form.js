/** The form of the Playground: prompts, settings, and what is wrong with them. */

import { ApiError } from "./api.js";
import { errorMessage, toast } from "./components.js";
import { h, replace } from "./dom.js";
import { fitMaxTokens } from "./lengths.js";
import { PromptColumns } from "./prompt_columns.js";
import { linkOf, readLink } from "./run_link.js";
import { createSettings } from "./sampling_settings.js";
import { load, store, write } from "./saved.js";

const NAME = "playground.form";
const FIRST_PROMPT = "She smiled and said";

/** Reads requests from the form. A reload keeps what it contains. */
export class PlaygroundForm {
  /** @param {import("./main.js").Context} context */
  constructor({ api, store: shared }) {
    this.api = api;
    this.shared = shared;
    this.prompts = new PromptColumns();
    this.settings = createSettings();
    /** Shows an error of the whole request. */
    this.problem = h("div", { hidden: true });
    this.isOffline = false;
    shared.subscribe("samplingDefaults", (values) => this.settings.showDefaults(values ?? {}));
    shared.subscribe("health", (health) => {
      if (this.isOffline && health !== "unreachable") this.fail(null);
    });
    const isRestored = load(NAME, (kept) => {
      this.restore({ prompts: kept.prompts.map(String), settings: kept.settings });
      return true;
    });
    if (!isRestored) this.prompts.replace([FIRST_PROMPT]);
    this.#openLink();
    window.addEventListener("hashchange", () => this.#openLink());
    window.addEventListener("pagehide", () => store(NAME, write(this.values())));
  }

  /** Return the prompts and settings as they are entered. */
  values() {
    return { prompts: this.prompts.texts(), settings: this.settings.values() };
  }

  /** Enter prompts and settings. @param {ReturnType<PlaygroundForm["values"]>} values */
  restore({ prompts, settings }) {
    this.prompts.replace(prompts);
    this.settings.restore(settings);
  }

  /** Return what the prompts and settings are, to notice a change. */
  text() {
    return JSON.stringify(this.values());
  }

  #openLink() {
    const linked = readLink(location.hash);
    if (!linked) return;
    history.replaceState(null, "", "#playground"); // a reload keeps what is changed from here on
    this.restore(linked);
    toast("The form is filled in from the link. Generate runs it.");
  }

  /** Return the link of the form, or null if it is too long. @param {number | undefined} seed */
  link(seed) {
    const values = this.values();
    if (seed !== undefined) values.settings.seed = String(seed);
    return linkOf(values);
  }

  /**
   * Return the request without the fields about streaming, or null after showing an error.
   * @param {"generate" | "score"} mode
   */
  read(mode) {
    const prompts = this.prompts.texts();
    this.fail(null);
    const empty = prompts.indexOf("");
    if (empty >= 0) {
      this.fail(prompts.length === 1 ? "Enter a prompt." : `Prompt ${empty + 1} is empty.`);
      this.prompts.focus(empty);
      return null;
    }
    let fields;
    try {
      fields = this.settings.fields();
    } catch (error) {
      this.fail(error.message);
      return null;
    }
    const prompt = prompts.length === 1 ? prompts[0] : prompts;
    const model = this.shared.get("model");
    const common = { ...(model ? { model } : {}), prompt };
    if (mode === "generate") return { ...common, ...fields };
    const options = { echo: true, max_tokens: 0, return_token_ids: true };
    return { ...common, ...options, prompt_logprobs: fields.logprobs ?? 0 };
  }

  /**
   * Return a request whose output fits into the context.
   * @param {Record<string, any> | null} body
   * @param {AbortSignal} [signal]
   */
  async fitted(body, signal) {
    if (!body || body.echo) return body;
    const server = { api: this.api, maxModelLen: this.shared.get("maxModelLen") };
    const inputs = [body.prompt].flat().map((prompt) => ({ prompt }));
    const limits = { wanted: body.max_tokens, truncated: body.truncate_prompt_tokens };
    const maxTokens = await fitMaxTokens(server, inputs, limits, { signal });
    return { ...body, max_tokens: maxTokens };
  }

  /** Show an error of the whole request, or none. @param {string | null} message */
  fail(message) {
    this.isOffline = false;
    replace(this.problem, message && errorMessage(message));
    this.problem.hidden = !message;
    if (message) this.problem.scrollIntoView({ block: "nearest" });
  }

  /** Show why a request failed. @param {Error} error */
  failRequest(error) {
    this.fail(error.message);
    if (!(error instanceof ApiError)) return;
    this.settings.mark(error.param);
    this.isOffline = error.status === 0;
    if (this.isOffline) this.shared.set("health", "unreachable");
  }
}
