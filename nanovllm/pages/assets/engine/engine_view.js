/**
 * Engine: the scheduler and the KV cache, live from /v1/engine/events, with pause, step and replay.
 *
 * The stream is open only while the tab is visible: the server records steps while it is watched.
 */

import { oncePerFrame } from "../charts/canvas.js";
import { timeHistogram } from "../charts/histogram.js";
import { sampleLengths } from "../client/lengths.js";
import { button, card, emptyState, errorMessage, toast } from "../elements/components.js";
import { h, keyMove, replace, targetOf } from "../elements/dom.js";
import { formatCount, formatThings } from "../elements/format.js";
import { blockGrid } from "./block_grid.js";
import { codeTable } from "./code_table.js";
import { controlBar } from "./control_bar.js";
import { engineFigures } from "./engine_figures.js";
import { followEvents } from "./engine_stream.js";
import { eventLog } from "./event_log.js";
import { createHistory, createNames } from "./replay.js";
import { requestList } from "./request_list.js";
import { requestLookup } from "./request_lookup.js";
import { stepTimeline } from "./step_timeline.js";

/** @import { Request, State } from "./replay.js" */

const CLOCK_MS = 1000; // between two updates of the ages in a pause, which has no frames
const MAX_STEPS = 512;
const MAX_FINISHED = 20;
const WAITING_LEAD = "In queue order, with the reason why each waits.";
const STEPS_LEAD =
  "A column is one step of the engine, a row one request. Choose a step to replay it; the left and " +
  "right arrow keys move.";
const SAMPLE_PREFIX =
  "It was the best of times, it was the worst of times, it was the age of wisdom, it was " +
  "the age of foolishness, it was the epoch of belief, it was the epoch of incredulity.";
const SAMPLE_ENDINGS = [
  "The king",
  "A ship",
  "At dawn",
  "She said",
  "The door",
  "He was",
  "My dear",
  "Once",
];

/**
 * Return the view.
 * @param {import("../inspector/main.js").Context} context
 */
export function engineView({ api, store, announce }) {
  const history = createHistory();
  const names = createNames();
  /** @type {AbortController | null} */
  let connection = null;
  const renderSoon = oncePerFrame(render);
  let isShown = false;
  /** Connect now instead of later. @type {(isBackground: boolean) => void} */
  let retry = () => {};
  let clock = 0;
  /** @type {string | null} */
  let selected = null;
  /** @type {Map<string, string>} prompts of unfinished requests by id */
  let prompts = new Map();

  /** @param {string | null} id */
  const choose = (id) => {
    selected = id;
    for (const part of [running, waiting, blocks, timeline, log]) part.select(selected);
  };
  /** @param {string | null} id */
  const select = (id) => choose(selected === id ? null : id);
  const lookup = requestLookup({
    store,
    names,
    choose(id) {
      choose(id);
      for (const list of [running, waiting]) list.reveal();
    },
  });
  /** @param {() => void} change of the step that is shown */
  const replay = (change) => {
    if (history.watched === null) fillGaps();
    change();
    schedule();
  };
  const watch = (/** @type {number | null} */ step) => replay(() => history.watch(step));
  const move = (/** @type {number} */ count) => replay(() => history.move(count));
  const figures = engineFigures();
  const code = codeTable();
  /** @param {string} view @param {string} prompt */
  const inspect = (view, prompt) => {
    store.set("prompt", prompt);
    location.hash = view;
  };
  const running = requestList("running", { names, inspect, onSelect: select });
  const waiting = requestList("waiting", { names, inspect, onSelect: select });
  const blocks = blockGrid({ names, onSelect: select });
  const timeline = stepTimeline({ names, onWatch: watch, onSelect: select });
  const log = eventLog({ names, onSelect: select, onWatch: watch });
  const ttft = timeHistogram({
    title: "Time to first token",
    explanation:
      "Measured by the server, from the arrival of a request to its first token. Waiting and " +
      "pauses are included; the network is not. The Playground measures in the browser.",
    unit: "first tokens",
  });
  const itl = timeHistogram({
    title: "Inter-token latency",
    explanation: "Measured by the server, between two tokens of a sequence. Pauses are included.",
    unit: "intervals",
  });
  const controls = controlBar({
    act: async (action) => {
      try {
        const { is_paused: isPaused } = await api.post("v1/engine/control", { action });
        if (action !== "step") announce(isPaused ? "The engine is paused." : "The engine runs.");
        store.set("isPaused", isPaused);
        history.watch(null);
        schedule();
      } catch (/** @type {any} */ error) {
        toast(error.message, "error");
      }
    },
    move,
    watch,
  });
  const message = h("div", { class: "v-message" });
  const samples = `Send ${SAMPLE_ENDINGS.length} sample prompts`;
  const sampleButton = button(samples, { kind: "primary" }, sendSamples);
  const noRequests = emptyState({
    title: "No request is running",
    text: "Requests of all clients appear here. Send one from the Playground, or sample prompts.",
    action: sampleButton,
  });
  const noRunning = h("p", { class: "secondary", text: "No request runs." });
  const noWaiting = h("p", { class: "secondary" });
  const omitted = h("p", { class: "secondary small-text", hidden: true });
  const runningCard = card("Running requests", { beside: requestLegend() }, [
    noRunning,
    running.element,
  ]);
  const waitingCard = card("Waiting requests", { lead: WAITING_LEAD }, [
    noWaiting,
    waiting.element,
    omitted,
  ]);
  const blockCard = card("KV cache blocks", {}, [figures.blockNote, blocks.element]);
  const content = h("div", { class: "stack", hidden: true }, [
    figures.element,
    noRequests,
    h("div", { class: "columns v-engine-columns" }, runningCard, waitingCard),
    blockCard,
    card("Steps", { lead: STEPS_LEAD }, [timeline.element]),
    h("div", { class: "columns thirds" }, [
      card("Events", {}, [log.element]),
      ttft.element,
      itl.element,
    ]),
    code.element,
  ]);
  const parts = [controls.element, message, lookup.element, content];
  const element = h("div", { class: "stack" }, parts);
  const statePanels = [
    ...[figures.element, ttft.element, itl.element],
    ...[runningCard, waitingCard, blockCard],
  ];

  element.addEventListener("keydown", (event) => {
    const count = keyMove(event)?.[1];
    if (!count || targetOf(event).closest("input, textarea, select, canvas")) return;
    event.preventDefault();
    move(count);
  });
  document.addEventListener("themechange", () => isShown && schedule());
  document.addEventListener("visibilitychange", update);
  store.subscribe("health", (health) => health === "ready" && retry(true));

  /** Connect while the tab is visible, and only then. */
  function update() {
    const isWanted = isShown && !document.hidden;
    if (isWanted && !connection) connect();
    if (!isWanted && connection) {
      connection.abort();
      connection = null;
    }
  }

  function connect() {
    connection = new AbortController();
    const { signal } = connection;
    let wasPaused = false;
    ({ retry } = followEvents({
      api,
      signal,
      async onopen() {
        wasPaused = false;
        await loadSteps(signal);
      },
      onevents(events) {
        for (const { event, data } of events) if (event === "state") history.addFrame(data);
        lookup.addFrame();
        const isPaused = Boolean(history.frames().at(-1)?.is_paused);
        if (isPaused && !wasPaused && history.hasUnloadedGap()) fillGaps();
        wasPaused = isPaused;
        store.set("isPaused", isPaused);
        replace(message);
        schedule();
      },
      onfailure(error, isFinal) {
        controls.disconnect();
        replace(
          message,
          errorMessage(isFinal ? error.message : `${error.message} The page tries again.`),
          isFinal && button("Try again", { small: true }, () => retry(false)),
        );
      },
    }));
  }

  /** @param {AbortSignal} signal */
  async function loadSteps(signal) {
    const { steps } = await api.get(`v1/engine/steps?last=${MAX_STEPS}`, { signal });
    history.loadSteps(steps);
  }

  /** Load the steps that frames have omitted: a frame contains only the newest ones. */
  async function fillGaps() {
    if (!connection) return;
    try {
      await loadSteps(connection.signal);
      schedule();
    } catch {
      // The replay then has the steps of the frames.
    }
  }

  function schedule() {
    if (isShown) renderSoon();
  }

  function render() {
    const shown = history.shown();
    if (!shown) return;
    const { state, newest, record, isEarlier } = shown;
    for (const { id } of state.requests) names.color(id);
    keepFinishedPrompts(newest.requests);
    content.hidden = false;
    figures.update(state, history.frames());
    code.update(state.config.parts);
    const isHeld = history.watched === null && state.is_paused;
    const pausedS = isHeld ? history.ageOfNewestS() : 0;
    running.update(state.requests, pausedS);
    waiting.update(state.requests, pausedS);
    clearTimeout(clock);
    if (isHeld) clock = setTimeout(schedule, CLOCK_MS);
    blocks.update(state);
    timeline.update({
      records: history.steps(),
      record,
      step: history.watched,
      maxTokens: state.config.max_num_batched_tokens,
    });
    log.update(history.steps(), history.watched, history.loadedUntil());
    ttft.update(state.ttft_s);
    itl.update(state.itl_s);
    const isOtherStep = history.watched !== null && state.step !== history.watched;
    const note = isOtherStep ? otherStepText(state, isEarlier) : "";
    controls.update(history, newest, note);
    for (const panel of statePanels) {
      panel.classList.toggle("v-faded", isEarlier);
      if (isOtherStep) panel.dataset.after = `after step ${state.step}`;
      else delete panel.dataset.after;
    }
    noRequests.hidden = state.requests.length > 0;
    noRunning.hidden = !running.element.hidden;
    noWaiting.hidden = !waiting.element.hidden;
    noWaiting.textContent = noWaitingText(state.config);
    omitted.hidden = !state.requests_omitted;
    omitted.textContent = `${formatThings(state.requests_omitted, "more request")} in the queue.`;
    lookup.finish(state);
  }

  /**
   * Offer the prompts of finished requests to the other views, where the server shows prompts.
   * @param {Request[]} requests of the newest frame
   */
  function keepFinishedPrompts(requests) {
    const unfinished = new Map(
      requests.flatMap(({ id, prompt }) => (prompt ? [/** @type {const} */ ([id, prompt])] : [])),
    );
    const finished = [...prompts].filter(([id]) => !unfinished.has(id));
    prompts = unfinished;
    if (!finished.length) return;
    const entries = finished.map(([id, prompt]) => ({ name: names.name(id), prompt }));
    store.set("finished", [...entries, ...(store.get("finished") ?? [])].slice(0, MAX_FINISHED));
  }

  /** Send one request with several prompts: a pause holds connections, and browsers have few. */
  async function sendSamples() {
    const prompt = SAMPLE_ENDINGS.map((ending) => `${SAMPLE_PREFIX} ${ending}`);
    try {
      await api.post("v1/completions", {
        model: store.get("model"),
        prompt,
        ...sampleLengths(store.get("maxModelLen"), 64),
      });
    } catch (/** @type {any} */ error) {
      toast(error.message, "error");
    }
  }

  return {
    element,
    show() {
      isShown = true;
      lookup.begin();
      if (lookup.isPending()) history.watch(null);
      update();
      schedule();
    },
    hide() {
      isShown = false;
      update();
    },
  };
}

/** @param {Record<string, number>} config */
function noWaitingText({ max_num_seqs: sequences, max_num_batched_tokens: tokens }) {
  return (
    `No request waits. One would if ${formatThings(sequences, "sequence")} ran, if it needed more ` +
    `blocks than are free, or if the ${formatCount(tokens)} tokens of a step were used up.`
  );
}

/**
 * Say which state the page shows with a replayed step that has none of its own.
 * @param {State} state
 * @param {boolean} isEarlier
 */
function otherStepText({ step }, isEarlier) {
  const nearest = `Requests, blocks and figures are those after step ${step}, the nearest recorded state.`;
  return isEarlier ? `No snapshot at or before this step. ${nearest}` : nearest;
}

function requestLegend() {
  /** @param {string} part @param {string} text */
  const item = (part, text) => h("span", {}, h("span", { class: `swatch v-part-${part}` }), text);
  return h("div", { class: "row legend v-request-legend" }, [
    item("cached", "prompt, cached"),
    item("computed", "prompt, computed"),
    item("pending", "prompt, to compute"),
    item("generated", "generated"),
  ]);
}
