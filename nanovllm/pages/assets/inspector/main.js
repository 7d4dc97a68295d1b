/**
 * The shell of the page: tabs, theme, API key and the state of the server.
 *
 * A part of the page is a function that returns its element with what can be done with it. A view is
 * such a part of a tab, made when the tab is first opened. `context` is what all views share.
 *
 * @typedef {{element: HTMLElement, show?: () => void, hide?: () => void}} View
 * @typedef {{api: typeof api, store: import("../client/store.js").Store,
 *   announce: (text: string) => void, vocabulary: import("../client/vocabulary.js").Vocabulary,
 *   tourOffer: () => HTMLElement | null}} Context
 */

import * as api from "../client/api.js";
import { createStore } from "../client/store.js";
import { createVocabulary } from "../client/vocabulary.js";
import { button, errorMessage, field, icon } from "../elements/components.js";
import { byId, h, replace, rovingFocus } from "../elements/dom.js";
import { engineView } from "../engine/engine_view.js";
import { attentionView } from "../inspection/attention_view.js";
import { embeddingsView } from "../inspection/embeddings_view.js";
import { lensView } from "../inspection/lens_view.js";
import { chatView } from "../playground/chat.js";
import { playgroundView } from "../playground/playground.js";
import { pausedBanner } from "./paused_banner.js";
import { startTour, tourOffer } from "./tour.js";

/** @type {{name: string, label: string, create: (context: Context) => View}[]} */
const VIEWS = [
  { name: "playground", label: "Playground", create: playgroundView },
  { name: "chat", label: "Chat", create: chatView },
  { name: "engine", label: "Engine", create: engineView },
  { name: "attention", label: "Attention", create: attentionView },
  { name: "lens", label: "Logit lens", create: lensView },
  { name: "embeddings", label: "Embeddings", create: embeddingsView },
];
const HEALTH_INTERVAL_MS = 5000;
const TABS_PADDING_PX = 12; // more than the padding beside the first and the last tab
/** @type {Record<string, string>} */
const STATUS_TEXTS = {
  ready: "ready",
  paused: "paused",
  loading: "loading the model",
  unreachable: "unreachable",
  locked: "needs a key",
};

const store = createStore({
  health: null,
  model: null,
  maxModelLen: null,
  hasChatTemplate: null,
  isPaused: false,
  prompt: "",
});

/** Have screen readers say a text. @param {string} text */
function announce(text) {
  byId("live").textContent = text;
}

/** Whether the server has asked for a key. */
let isKeyNeeded = false;

/** @type {Context} */
const context = { api, store, announce, vocabulary: createVocabulary(api), tourOffer };

function addTabs() {
  const list = byId("tabs");
  const main = byId("main");
  replace(main);
  /** @type {Map<string, View>} */
  const opened = new Map();
  /** How far each view was scrolled. @type {Map<string, number>} */
  const scrolled = new Map();
  /** @type {string | null} */
  let current = null;

  for (const { name, label } of VIEWS) {
    const select = () => (location.hash = name);
    const tab = h("button", {
      role: "tab",
      class: "tab",
      id: `tab-${name}`,
      text: label,
      "aria-controls": `panel-${name}`,
      onclick: select,
      onfocus: select,
    });
    list.append(tab);
    const panel = h("section", {
      role: "tabpanel",
      class: "panel",
      id: `panel-${name}`,
      "aria-labelledby": `tab-${name}`,
      hidden: true,
    });
    main.append(panel);
  }
  rovingFocus(list, ".tab");
  fadeEdges(list);

  function open() {
    const [hash] = location.hash.slice(1).split("?");
    const view = VIEWS.find(({ name }) => name === hash) ?? VIEWS[0];
    if (view.name === current) return;
    if (current) {
      scrolled.set(current, scrollY);
      opened.get(current)?.hide?.();
    }
    current = view.name;
    for (const { name } of VIEWS) {
      const isSelected = name === current;
      const tab = byId(`tab-${name}`);
      tab.setAttribute("aria-selected", String(isSelected));
      tab.tabIndex = isSelected ? 0 : -1;
      byId(`panel-${name}`).hidden = !isSelected;
      if (isSelected) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    document.title = `${view.label} · nanovllm inspector`;
    const panel = byId(`panel-${current}`);
    try {
      const shown = opened.get(current) ?? view.create(context);
      if (!opened.has(current)) replace(panel, shown.element);
      opened.set(current, shown);
      scrollTo(0, scrolled.get(current) ?? 0);
      shown.show?.();
    } catch (/** @type {any} */ error) {
      replace(panel, errorMessage(`This view failed: ${error.message}`));
      console.error(error);
    }
  }
  window.addEventListener("hashchange", open);
  open();
}

/** Fade the edges of the tabs beyond which there are more. @param {HTMLElement} list */
function fadeEdges(list) {
  const update = () => {
    const rest = list.scrollWidth - list.clientWidth - list.scrollLeft;
    list.classList.toggle("more-before", list.scrollLeft > TABS_PADDING_PX);
    list.classList.toggle("more-after", rest > TABS_PADDING_PX);
  };
  list.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(list);
}

function addTourButton() {
  byId("actions").append(
    button(
      "Take the tour",
      { icon: "info", iconOnly: true, kind: "quiet", small: true },
      startTour,
    ),
  );
}

function addThemeButton() {
  const toggle = button("Theme", { icon: "moon", iconOnly: true, kind: "quiet", small: true });
  const update = () => {
    const isDark = document.documentElement.dataset.theme === "dark";
    const label = isDark ? "Use the light theme" : "Use the dark theme";
    toggle.setAttribute("aria-label", label);
    toggle.title = label;
    replace(toggle, icon(isDark ? "sun" : "moon"));
  };
  toggle.addEventListener("click", () => document.dispatchEvent(new Event("themechoice")));
  document.addEventListener("themechange", update);
  byId("actions").append(toggle);
  update();
}

/** Ask for an API key; resolves to it, or to null where the dialog is closed without one. */
function askForKey() {
  isKeyNeeded = true;
  store.set("health", "locked");
  const input = h("input", {
    type: "password",
    class: "input",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    name: "key",
  });
  const wasWrong = api.hasKey();
  const form = h("form", { method: "dialog", class: "stack" }, [
    h("h2", { id: "key-title", text: "API key" }),
    h("p", {
      class: "secondary",
      text:
        "This server asks for a key. The page keeps it in memory until it is closed, and sends " +
        "it to this server only.",
    }),
    wasWrong && errorMessage("The server does not accept this key."),
    field({ label: "Key", control: input }),
    h("div", { class: "row end" }, [
      button("Cancel", { kind: "quiet" }, () => dialog.close("")),
      button("Use the key", { kind: "primary", type: "submit" }),
    ]),
  ]);
  const dialog = h("dialog", { class: "dialog", "aria-labelledby": "key-title" }, form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close(input.value.trim());
  });
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const key = dialog.returnValue;
      dialog.remove();
      updateKeyButton(Boolean(key));
      resolve(key || null);
    });
  });
}

/** Show the button that enters or forgets the key. @param {boolean} isSet */
function updateKeyButton(isSet) {
  const label = isSet ? "Forget the API key" : "Enter an API key";
  document.getElementById("key-button")?.remove();
  const key = button(
    label,
    { icon: "key", iconOnly: isSet, kind: isSet ? "quiet" : "", small: true, id: "key-button" },
    async () => {
      if (isSet) {
        api.setKey(null);
        updateKeyButton(false);
        setReady();
        announce("The API key is forgotten.");
      } else {
        api.setKey(await askForKey());
        checkHealth();
      }
    },
  );
  byId("actions").prepend(key);
}

function addStatus() {
  const dot = h("span", { class: "dot", "aria-hidden": "true" });
  const text = h("span", { class: "status-text hidden-on-phone" });
  const model = h("span", { class: "status-model ellipsis" });
  replace(byId("status"), dot, model, text);
  const update = () => {
    const health = store.get("health");
    const state = health === "ready" && store.get("isPaused") ? "paused" : health;
    dot.className = `dot ${state ?? ""}`;
    text.textContent = state ? STATUS_TEXTS[state] : "connecting";
  };
  store.subscribe("health", update);
  store.subscribe("isPaused", update);
  store.subscribe("model", (name) => {
    model.textContent = name ?? "";
    model.title = name ?? "";
  });
  let isAsking = false;
  const check = async () => {
    if (document.hidden || isAsking) return;
    isAsking = true;
    await checkHealth();
    isAsking = false;
  };
  setInterval(check, HEALTH_INTERVAL_MS);
  document.addEventListener("visibilitychange", check);
  check();
}

/** Show that the server is ready for a request, or for the key. */
function setReady() {
  store.set("health", isKeyNeeded && !api.hasKey() ? "locked" : "ready");
}

async function checkHealth() {
  try {
    await api.get("health");
    setReady();
  } catch (/** @type {any} */ error) {
    store.set("health", error.status ? "loading" : "unreachable");
    return;
  }
  if (store.get("model")) return;
  try {
    const [model] = (await api.get("v1/models", { isBackground: true })).data;
    store.set("maxModelLen", model.max_model_len);
    store.set("samplingDefaults", model.sampling_defaults);
    store.set("hasChatTemplate", model.has_chat_template);
    store.set("model", model.id);
    setReady();
  } catch (/** @type {any} */ error) {
    if (error.status !== 401) console.error(error);
  }
}

api.onKeyNeeded(askForKey);
api.onPause((isPaused) => store.set("isPaused", isPaused));
byId("top").append(pausedBanner(context));
addTourButton();
addThemeButton();
addTabs();
addStatus();
