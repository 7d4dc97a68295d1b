/** A request as a curl command and as a Python program. The API key is named, never shown. */

const KEY_VARIABLE = "NANOVLLM_API_KEY";
/** Fields that are arguments of the openai client; the others go into `extra_body`. */
const CLIENT_FIELDS = new Set([
  "model",
  "prompt",
  "best_of",
  "echo",
  "frequency_penalty",
  "logit_bias",
  "logprobs",
  "max_tokens",
  "n",
  "presence_penalty",
  "seed",
  "stop",
  "stream",
  "suffix",
  "temperature",
  "top_p",
  "user",
]);

/**
 * Return the curl command for POSIX shells.
 * @param {string} base the server's address, ending with a slash
 * @param {object} body
 * @param {boolean} hasKey
 */
export function curlCommand(base, body, hasKey) {
  const lines = [`curl ${quote(`${base}v1/completions`)}`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(`-d ${quote(JSON.stringify(body, null, 2))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

/** @param {string} text */
function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * Return the program for the openai package.
 * @param {string} base the server's address, ending with a slash
 * @param {Record<string, any>} body
 * @param {boolean} hasKey
 */
export function pythonProgram(base, body, hasKey) {
  const entries = Object.entries(body);
  const own = entries.filter(([name]) => CLIENT_FIELDS.has(name));
  const others = entries.filter(([name]) => !CLIENT_FIELDS.has(name));
  const key = hasKey ? `os.environ[${literal(KEY_VARIABLE)}]` : literal("none");
  const lines = own.map(([name, value]) => `    ${name}=${literal(value)},`);
  if (others.length) lines.push(`    extra_body=${literal(Object.fromEntries(others))},`);
  const isScore = "prompt_logprobs" in body;
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${base}v1`)}, api_key=${key})`,
    "completion = client.completions.create(",
    ...lines,
    ")",
    "for choice in completion.choices:",
    `    print(choice.${isScore ? "prompt_logprobs" : "text"})`,
    "",
  ].join("\n");
}

/** Return a value of JSON as a Python literal. @param {any} value @returns {string} */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    const entries = Object.entries(value).map(([name, of]) => `${literal(name)}: ${literal(of)}`);
    return `{${entries.join(", ")}}`;
  }
  return JSON.stringify(value); // of numbers and texts, which Python reads alike
}
