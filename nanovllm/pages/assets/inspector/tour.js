/**
 * The tour: five steps, each beside the part of the page that it is about.
 *
 * The dialog is not modal, because each step asks the reader to do something on the page. Escape
 * ends it. It is offered until it was started or declined once; the button in the header stays.
 */

import { button } from "../elements/components.js";
import { byId, h, replace } from "../elements/dom.js";

const DECLINED = "nanovllm.tour";
const STEPS = [
  {
    view: "playground",
    target: ".composer",
    title: "Generate",
    text:
      "Write a beginning and choose Generate, or press Ctrl+Enter. The model continues it " +
      "token by token.",
  },
  {
    view: "playground",
    target: ".playground-results",
    title: "Read a token",
    text:
      "The colour of a token is its probability. Point at one for its figures. Click one, or " +
      "press Enter on it, for its alternatives.",
  },
  {
    view: "playground",
    target: ".playground-results",
    title: "Continue from an alternative",
    text:
      "Choose an alternative in the list of a token. The text before it stays, and the model " +
      "writes on from your choice. The history keeps the run before.",
  },
  {
    view: "engine",
    target: ".v-controls",
    title: "Pause and step the engine",
    text:
      "Choose Pause, Send 8 sample prompts, then Step several times. Each step computes tokens " +
      "of several requests together. The page says why a request waits. Resume ends the pause.",
  },
  {
    view: "attention",
    target: ".v-prompt",
    title: "Look inside the model",
    text:
      "Attention shows which tokens each head reads, Logit lens what each layer would predict. " +
      "Both take any prompt.",
  },
];

/** Whether the tour was started or declined before. */
function wasOffered() {
  try {
    return localStorage.getItem(DECLINED) !== null;
  } catch {
    return false;
  }
}

function setOffered() {
  try {
    localStorage.setItem(DECLINED, "offered");
  } catch {
    // Without storage the tour is offered again.
  }
  document.dispatchEvent(new Event("touroffered"));
}

/** Return the offer of the tour to a first visitor, or null. */
export function tourOffer() {
  if (wasOffered()) return null;
  const offer = h("div", { class: "row tour-offer" }, [
    button("Take the tour: 5 steps", { kind: "primary", small: true }, startTour),
    button("No, thanks", { kind: "quiet", small: true }, setOffered),
  ]);
  document.addEventListener("touroffered", () => offer.remove(), { once: true });
  return offer;
}

/** @type {(() => void) | null} */
let endTour = null;

/** Start the tour at its first step; one that is open ends. */
export function startTour() {
  endTour?.();
  setOffered();
  const opener = /** @type {HTMLElement | null} */ (document.activeElement);
  let index = 0;
  const title = h("h2", { id: "tour-title", tabindex: "-1" });
  const text = h("p", { id: "tour-text" });
  const back = button("Back", { small: true }, () => show(index - 1));
  const next = button("Next", { kind: "primary", small: true }, () =>
    index + 1 < STEPS.length ? show(index + 1) : end(),
  );
  const close = button("End the tour", { kind: "quiet", small: true }, () => end());
  const element = h(
    "div",
    {
      class: "stack tour",
      role: "dialog",
      "aria-labelledby": "tour-title",
      "aria-describedby": "tour-text",
      onkeydown: (/** @type {KeyboardEvent} */ event) => event.key === "Escape" && end(),
    },
    title,
    text,
    h("div", { class: "row between" }, close, h("div", { class: "row" }, back, next)),
  );

  /** @param {number} step */
  function show(step) {
    index = step;
    const { view, target, title: name, text: what } = STEPS[step];
    location.hash = view;
    title.textContent = `${step + 1} of ${STEPS.length}: ${name}`;
    text.textContent = what;
    back.disabled = step === 0;
    replace(next, h("span", { text: step + 1 < STEPS.length ? "Next" : "Finish" }));
    // The view of another tab is made when the address has changed.
    setTimeout(() => {
      if (element.isConnected) mark(document.querySelector(`#panel-${view} ${target}`));
    });
    title.focus(); // screen readers read the step
  }

  function mark(/** @type {Element | null} */ target) {
    document.querySelector(".tour-target")?.classList.remove("tour-target");
    target?.classList.add("tour-target");
    target?.scrollIntoView({ block: "nearest" });
  }

  function end() {
    endTour = null;
    element.remove();
    mark(null);
    if (opener?.isConnected) opener.focus();
    else byId("main").focus();
  }

  endTour = end;
  document.body.append(element);
  show(0);
}
