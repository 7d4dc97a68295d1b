/** The bar above the engine view: its mode, pause, step, resume, and the slider of the replay. */

import { button } from "../elements/components.js";
import { h } from "../elements/dom.js";
import { formatDuration } from "../elements/format.js";

/** @import { History, State } from "./replay.js" */

/**
 * Return the bar. `act` sends an action to the server, `move` and `watch` choose the shown step.
 * @param {{act: (action: string) => void, move: (count: number) => void,
 *   watch: (step: number | null) => void}} options
 */
export function controlBar({ act, move, watch }) {
  const status = h("span", { class: "v-live" });
  const pause = button("Pause", { icon: "pause", small: true }, () => act("pause"));
  const resume = button("Resume", { icon: "play", small: true, hidden: true }, () => act("resume"));
  const step = button("Step", { icon: "step", small: true, disabled: true }, () => act("step"));
  const back = button("Previous step", { icon: "back", iconOnly: true, small: true }, () =>
    move(-1),
  );
  const forth = button("Next step", { icon: "step", iconOnly: true, small: true }, () => move(1));
  const live = button("Live", { small: true }, () => watch(null));
  /** @type {number[]} recorded steps; the slider chooses among them */
  let numbers = [];
  const slider = h("input", {
    type: "range",
    class: "v-slider",
    "aria-label": "Replay step",
    min: 0,
    max: 0,
    step: 1,
    oninput: () =>
      watch(slider.value === slider.max ? null : (numbers[Number(slider.value)] ?? null)),
  });
  const hint = h("p", { class: "secondary small-text v-control-hint", hidden: true });
  const banner = h("p", { class: "v-banner", role: "status", hidden: true });
  const element = h("div", { class: "card row v-controls" }, [
    h("div", { class: "row" }, status, pause, resume, step),
    h("div", { class: "row v-replay", role: "group", "aria-label": "Replay" }, [
      back,
      slider,
      forth,
      live,
    ]),
    banner,
    hint,
  ]);
  return {
    element,
    disconnect() {
      status.textContent = "Disconnected";
      status.className = "v-live v-live-off";
    },
    /**
     * @param {History} history
     * @param {State} newest
     * @param {string} note which state the page shows with the step, if another
     */
    update(history, newest, note) {
      const { is_paused: isPaused, can_control: canControl } = newest;
      const watched = history.watched;
      const leftS = Math.ceil(Math.max(newest.pause_left_s - history.ageOfNewestS(), 0));
      const mode = watched !== null ? "replay" : isPaused ? "paused" : "on";
      status.textContent = {
        replay: `Replay of step ${watched}`,
        paused: `Paused after step ${newest.step}`,
        on: "Live",
      }[mode];
      status.className = `v-live v-live-${mode}`;
      pause.hidden = isPaused;
      resume.hidden = !isPaused;
      for (const control of [pause, resume]) control.disabled = !canControl;
      step.disabled = !canControl || !isPaused;
      const texts = canControl
        ? isPaused
          ? "Step runs one step. The pause ends in " +
            `${formatDuration(leftS)}, or when no page watches.`
          : ""
        : "Pause and step are off on this server: it has API keys, or listens on an address that " +
          "other machines reach. The flag --inspector-controls turns them on.";
      hint.textContent = texts;
      hint.hidden = !texts;
      banner.textContent = note;
      banner.hidden = !note;
      numbers = history.steps().map(({ step: number }) => number);
      const last = Math.max(numbers.length - 1, 0);
      const shown = watched === null ? last : Math.max(numbers.indexOf(watched), 0);
      slider.max = String(last);
      slider.value = String(shown);
      slider.setAttribute("aria-valuetext", watched === null ? "live" : `step ${watched}`);
      back.disabled = shown === 0;
      forth.disabled = watched === null;
      live.disabled = watched === null;
    },
  };
}
