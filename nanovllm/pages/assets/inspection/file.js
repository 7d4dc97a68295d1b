/** The script of a self-contained file: shows the data in it by one of the page's views. */

import { errorMessage } from "../elements/components.js";
import { showData } from "../elements/file.js";
import { ablationExplorer } from "./ablation_file.js";
import { attentionExplorer } from "./attention_view.js";
import { embeddingsExplorer } from "./embeddings_view.js";
import { lensExplorer } from "./lens_view.js";

/** @type {Record<string, (data: any) => HTMLElement>} */
const EXPLORERS = {
  attention: attentionExplorer,
  "logit-lens": lensExplorer,
  embeddings: embeddingsExplorer,
  ablation: ablationExplorer,
};

showData((data) => {
  try {
    return EXPLORERS[data.kind](data);
  } catch (/** @type {any} */ error) {
    return errorMessage(`This file cannot be shown: ${error.message}`);
  }
});
