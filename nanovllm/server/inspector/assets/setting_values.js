/** Values of settings, read from the texts of fields. */

/** Return the lines of a text; "\n" and "\t" are escapes. @param {string} text */
export function lines(text) {
  const escapes = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (escape) => escapes[escape]));
}

/** @param {string} text */
export function toInteger(text) {
  if (!/^\d+$/.test(text)) throw new Error(`${text} is no token id`);
  return Number(text);
}

/** @param {string} line such as "13: -5" */
export function toBias(line) {
  const match = /^\s*(\d+)\s*[:=\s]\s*([-+.\de]+)\s*$/i.exec(line);
  if (!match || !Number.isFinite(Number(match[2]))) throw new Error(`${line} is no id and bias`);
  return [match[1], Number(match[2])];
}

/** @param {string} text */
export function toObject(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`this is no JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error("enter a JSON object");
  }
  return value;
}
