/** Values of settings, read from the texts of fields. */

/**
 * Return the fields of a request that the text of a setting stands for, none if it is empty.
 * @param {string} name
 * @param {string} kind of `Setting`
 * @param {string} text
 * @returns {Record<string, any>}
 */
export function readText(name, kind, text) {
  if (text.trim() === "") return {};
  switch (kind) {
    case "number":
    case "slider":
      return { [name]: Number(text) };
    case "lines":
      return { [name]: lines(text) };
    case "ids":
      return {
        [name]: text
          .split(/[\s,]+/)
          .filter(Boolean)
          .map(toInteger),
      };
    case "bias":
      return { [name]: Object.fromEntries(lines(text).map(toBias)) };
    case "schema":
      return { structured_outputs: { json: toObject(text) } };
    case "regex":
      return { structured_outputs: { regex: text } };
    case "choice":
      return { structured_outputs: { choice: lines(text) } };
    case "json":
      return toObject(text);
    default:
      return { [name]: text };
  }
}

/** Return the lines of a text; "\n" and "\t" are escapes. @param {string} text */
function lines(text) {
  /** @type {Record<string, string>} */
  const escapes = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (pair) => escapes[pair]));
}

/** @param {string} text */
function toInteger(text) {
  if (!/^\d+$/.test(text)) throw new Error(`${text} is no token id`);
  return Number(text);
}

/** @param {string} line such as "13: -5" */
function toBias(line) {
  const match = /^\s*(\d+)\s*[:=\s]\s*([-+.\de]+)\s*$/i.exec(line);
  if (!match || !Number.isFinite(Number(match[2]))) throw new Error(`${line} is no id and bias`);
  return [match[1], Number(match[2])];
}

/** @param {string} text */
function toObject(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (/** @type {any} */ error) {
    throw new Error(`this is no JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error("enter a JSON object");
  }
  return value;
}
