/** The one request of a view that is under way, and the button that stops it. */

import { button } from "../elements/components.js";

/**
 * Return the control.
 * @param {{focusAfter: () => HTMLElement}} options what gets the focus of a button without use
 */
export function stopControl({ focusAfter }) {
  /** @type {AbortController | null} */
  let controller = null;
  const stop = button("Stop", { icon: "stop", kind: "danger", disabled: true }, () =>
    controller?.abort(),
  );

  /** Note the end of a request, if it is the newest. @param {AbortSignal} [signal] */
  function end(signal = controller?.signal) {
    if (controller?.signal !== signal) return;
    controller = null;
    if (document.activeElement === stop) focusAfter().focus();
    stop.disabled = true;
  }

  return {
    button: stop,
    end,
    isBusy: () => controller !== null,
    /** Return whether a signal is that of the newest request. @param {AbortSignal} signal */
    isCurrent: (signal) => controller?.signal === signal,
    /** Abort the last request. */
    abort: () => controller?.abort(),
    /** Abort the last request, and return the signal of the next. */
    begin() {
      controller?.abort();
      controller = new AbortController();
      stop.disabled = false;
      return controller.signal;
    },
  };
}
