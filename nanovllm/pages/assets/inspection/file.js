/** The script of a self-contained file: shows the data in it by one of the page's views. */

import { attentionExplorer } from "./attention_view.js";
import { errorMessage, themeButton } from "../elements/components.js";
import { embeddingsExplorer } from "./embeddings_view.js";
import { lensExplorer } from "./lens_view.js";

const EXPLORERS = {
  attention: attentionExplorer,
  "logit-lens": lensExplorer,
  embeddings: embeddingsExplorer,
};

/** Return the view of the data. @param {{kind: string}} data */
function explorer(data) {
  try {
    return EXPLORERS[data.kind](data);
  } catch (error) {
    return errorMessage(`This file cannot be shown: ${error.message}`);
  }
}

const content = document.getElementById("data").textContent;
document.getElementById("main").append(explorer(JSON.parse(content)));
document.getElementById("actions").append(themeButton());
