/** What is wrong with a whole request, beside the button that sends it. */

import { errorMessage } from "../elements/components.js";
import { h, replace } from "../elements/dom.js";

/** Return the box, which is hidden while nothing is wrong. */
export function problemBox() {
  const element = h("div", { hidden: true });
  return {
    element,
    /** Show an error, or none. @param {string | null} message */
    show(message) {
      replace(element, message && errorMessage(message));
      element.hidden = !message;
      if (message) element.scrollIntoView({ block: "nearest" });
    },
  };
}
