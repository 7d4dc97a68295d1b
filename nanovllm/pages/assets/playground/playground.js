/** The view "Playground": prompts side by side, generated or scored token by token. */

import { allIds, branchAt, generate, newChoice, score } from "../client/generation.js";
import { button, copyText, emptyState, toast } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";
import { formatThings } from "../elements/format.js";
import { hideTooltip } from "../elements/overlays.js";
import { choiceView } from "./choice_view.js";
import { coloringControl } from "./coloring.js";
import { playgroundForm } from "./playground_form.js";
import { countTokens, runHistory } from "./run_history.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { stopControl } from "./stop_control.js";

/**
 * @import { Choice } from "../client/generation.js"
 * @import { ChoiceView } from "./choice_view.js"
 * @typedef {Record<string, any>} Body a request
 * @typedef {{mode: "generate" | "score", prompts: string[], body: Body, choices: Choice[],
 *   settings: Record<string, any>, numAlternatives: number, sent: Body, started: Date,
 *   note: string}} Run `sent` is the request, which has a seed, and the kept tokens in its prompt
 *   where a choice is continued
 */

const MAX_CHOICES = 128; // as in the API
const MAX_SEED = 2 ** 31; // of a seed that the page draws
const QUESTIONS = {
  lens: "Where does the probability of a prompt collapse?",
  attention: "Which head looks at the previous token?",
  engine: "Why does a request wait?",
  embeddings: "Which tokens are similar?",
};

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function playgroundView(context) {
  const { api, store, announce, tourOffer, vocabulary } = context;
  const form = playgroundForm(context);
  const runs = runHistory({ onselect: restore });
  /** @type {Run | null} */
  let run = null;
  /** The form when the run was shown. */
  let shownForm = "";
  /** @type {Map<Choice, ChoiceView>} */
  const views = new Map();
  /** @type {Set<Choice>} */
  const changed = new Set();
  const coloring = coloringControl({ onchange: () => [...views.keys()].forEach(update) });
  const stop = stopControl({ focusAfter: () => start });
  const start = button(
    "Generate",
    { icon: "play", kind: "primary", title: "Ctrl+Enter", "aria-keyshortcuts": "Control+Enter" },
    () => begin("generate"),
  );
  const scoring = button(
    "Score prompt",
    { title: "Show the probability of each token of the prompt; generate nothing" },
    () => begin("score"),
  );
  const resultGrid = h("div", { class: "prompt-grid", hidden: true });
  const hint = emptyState({
    title: "No tokens yet",
    text:
      "Generate continues the prompt. Each token then shows its probability, its rank and its " +
      "alternatives. Choose an alternative to continue from there.",
    action: h("div", { class: "stack tight" }, tourOffer(), questions()),
  });
  const copies = h("div", { class: "row request-row" }, [
    h("span", { class: "secondary small-text", text: "This request" }),
    copyButton("Copy as curl", () => copyRequest("curl command", curlCommand)),
    copyButton("Copy as Python", () => copyRequest("Python program", pythonProgram)),
    copyButton("Copy link", copyLink, "A link that fills in these prompts and settings"),
  ]);
  const element = h("div", { class: "playground", onkeydown: startByKey }, [
    h("h2", { class: "visually-hidden", text: "Playground" }),
    h("section", { class: "card stack composer", "aria-label": "Prompt" }, [
      form.prompts.element,
      h("div", { class: "row" }, start, scoring, stop.button, form.prompts.addButton),
    ]),
    form.settings.element,
    h("div", { class: "playground-results stack" }, form.problem, copies, hint, resultGrid),
    runs.element,
  ]);

  /** @param {KeyboardEvent} event */
  function startByKey(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    begin("generate");
  }

  /** Return the run that is shown, unless the form has changed since. */
  const shownRun = () => (run && form.text() === shownForm ? run : null);

  function copyLink() {
    const link = form.link(shownRun()?.sent.seed);
    if (link) copyText(link, "link");
    else toast("The prompts are too long for a link.", "error");
  }

  /** @param {string} what @param {typeof curlCommand} write */
  async function copyRequest(what, write) {
    const body = shownRun()?.sent ?? (await form.fitted(form.read("generate")));
    if (body) copyText(write(api.address(""), body, api.hasKey()), what);
  }

  /** @param {Run["mode"]} mode */
  async function begin(mode) {
    const read = form.read(mode);
    if (!read) return;
    const { prompts, settings } = form.values();
    const numChoices = mode === "generate" ? (read.n ?? 1) : 1;
    if (numChoices > MAX_CHOICES) {
      form.fail(`Choices is ${numChoices}, but must be at most ${MAX_CHOICES}.`);
      return;
    }
    const signal = stop.begin();
    const body = await form.fitted(read, signal);
    if (signal.aborted) return stop.end(signal);
    const choices = prompts.flatMap((_, prompt) =>
      Array.from({ length: numChoices }, (_each, index) => newChoice(prompt, index)),
    );
    const numAlternatives = body.logprobs ?? body.prompt_logprobs ?? 0;
    const shownBefore = run;
    const sent = seeded(body);
    const started = new Date();
    show({ mode, prompts, body, choices, settings, numAlternatives, sent, started, note: "" });
    send(signal, sent, choices, shownBefore);
  }

  /**
   * Continue a choice from its end, or from an alternative of one of its tokens.
   * @param {Run} from
   * @param {Choice} choice
   * @param {{position: number, id: number} | null} at
   */
  function branch(from, choice, at) {
    const fields = from.mode === "score" ? form.read("generate") : { ...from.body };
    if (!fields) return;
    delete fields.n;
    const position = at?.position ?? choice.tokens.length - 1;
    const branched = branchAt(choice, position, at?.id ?? choice.tokens[position].id);
    if (!at) branched.tokens[position] = { ...choice.tokens[position], origin: "kept" };
    const prompt = allIds(branched);
    const room = (store.get("maxModelLen") ?? Infinity) - prompt.length;
    if (room < 1) {
      toast("The text fills the model's context.", "error");
      return;
    }
    fields.max_tokens = Math.min(fields.max_tokens ?? room, room);
    form.fail(null);
    const signal = stop.begin();
    const sent = seeded({ ...fields, prompt });
    show({
      ...from,
      mode: "generate",
      body: fields,
      choices: from.choices.map((other) => (other === choice ? branched : other)),
      numAlternatives: Math.min(from.numAlternatives, fields.logprobs ?? 0),
      sent,
      started: new Date(),
      note: at ? `from ${vocabulary.label(at.id)}` : "continued",
    });
    views.get(branched)?.focus(position);
    send(signal, sent, [branched], null);
  }

  /**
   * @param {AbortSignal} signal
   * @param {Body} body
   * @param {Choice[]} choices
   * @param {Run | null} shownBefore shown again if the request fails before its first token
   */
  async function send(signal, body, choices, shownBefore) {
    const sentRun = run;
    const action = "echo" in body ? score : generate;
    const onchange = (/** @type {Choice} */ choice) => {
      if (!changed.size) requestAnimationFrame(flush);
      changed.add(choice);
    };
    const error = await action(context, body, choices, { signal, onchange });
    announce(
      error ? error.message : `Finished with ${formatThings(countTokens(choices), "token")}.`,
    );
    if (stop.isCurrent(signal)) {
      if (hasFailedEmpty(sentRun) && shownBefore) show(shownBefore);
      resultGrid.hidden = hasFailedEmpty(run);
      if (error) form.failRequest(error);
      stop.end();
    }
    runs.update();
  }

  function flush() {
    const choices = [...changed];
    changed.clear();
    choices.forEach(update);
  }

  /** @param {Choice} choice */
  function update(choice) {
    if (!run) return;
    const { mode, numAlternatives, prompts } = run;
    // The tokens of a scored prompt include the prompt.
    const isScored = !choice.promptIds.length && choice.tokens[0]?.origin === "prompt";
    views
      .get(choice)
      ?.update(choice, {
        promptText: isScored || mode === "score" ? "" : prompts[choice.promptIndex],
        isScore: mode === "score",
        coloring: coloring.value(choice),
        numAlternatives,
      });
  }

  /** Show a run; a new one goes into the history. @param {Run} shown */
  function show(shown) {
    hideTooltip();
    run = shown;
    runs.show(shown);
    views.clear();
    hint.hidden = true;
    shownForm = form.text();
    resultGrid.hidden = hasFailedEmpty(shown);
    const isOne = shown.prompts.length === 1;
    const cards = shown.prompts.map((_, index) => {
      const label = isOne ? "Tokens" : `Tokens of prompt ${index + 1}`;
      const title = h("h3", { class: isOne ? "visually-hidden" : "result-title", text: label });
      return h("section", { class: "card stack prompt-card", "aria-label": label }, title);
    });
    replace(resultGrid, cards);
    const perPrompt = shown.choices.length / shown.prompts.length;
    shown.choices.forEach((choice, index) => {
      const card = cards[choice.promptIndex];
      const number = perPrompt > 1 ? `Choice ${choice.index + 1}` : null;
      const view = choiceView({
        vocabulary,
        title: number,
        label: `${card.getAttribute("aria-label")}${number ? `, ${number.toLowerCase()}` : ""}`,
        toolbar: index === 0 ? coloring.element : null,
        onbranch: (position, id) => branch(shown, choice, { position, id }),
        onextend: () => branch(shown, choice, null),
        onfollow: (request) => store.set("engineRequest", request),
        oninspect(name, text) {
          store.set("prompt", text);
          location.hash = name;
        },
      });
      views.set(choice, view);
      card.append(view.element);
      update(choice);
    });
  }

  /** @param {Run} shown */
  async function restore(shown) {
    stop.abort();
    form.restore(shown);
    await vocabulary.load().catch(() => {}); // its tokens may be from before a reload
    show(shown);
    const error = shown.choices.find(({ status }) => status === "failed")?.error;
    form.fail(error ? `This run failed: ${error}` : null);
  }

  const last = runs.newest();
  if (last)
    vocabulary.load().then(
      () => run ?? show(last),
      () => {},
    );
  window.addEventListener("pagehide", runs.save);
  return { element, hide: hideTooltip };
}

/** Return whether a run failed before its first token. @param {Run | null} run */
function hasFailedEmpty(run) {
  return Boolean(run?.choices.every(({ status, tokens }) => status === "failed" && !tokens.length));
}

/**
 * Return a request with a seed, so that the link of its run gives the same text. Scores need none.
 * @param {Body} body
 */
function seeded(body) {
  return body.echo ? body : { seed: Math.floor(Math.random() * MAX_SEED), ...body };
}

/** @param {string} label @param {() => void} onclick @param {string} [title] */
function copyButton(label, onclick, title) {
  return button(label, { icon: "copy", kind: "quiet", small: true, title }, onclick);
}

/** Return links to the views that answer what a first visitor may ask. */
function questions() {
  const links = Object.entries(QUESTIONS).map(([view, text]) =>
    h("li", {}, h("a", { href: `#${view}`, text })),
  );
  return h("ul", { class: "row questions", "aria-label": "What the other views answer" }, links);
}
