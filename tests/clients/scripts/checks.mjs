// What all node scripts share: the server's address, and checks whose outcomes are recorded.
// It does what checks.py does.
import { appendFileSync, readFileSync } from "node:fs";

export const URL = process.env.NANOVLLM_URL;
export const V1 = `${URL}/v1`;
export const KEY = process.env.OPENAI_API_KEY;
export const MODEL = process.env.NANOVLLM_MODEL;
const config = readFileSync(`${process.env.NANOVLLM_MODEL_FOLDER}/config.json`, "utf-8");
export const DIMENSIONS = JSON.parse(config).n_embd;
export const PROMPT = "The rabbit said that";
export const MESSAGES = [
  { role: "system", content: "Tell a tale." },
  { role: "user", content: "Who went into the garden?" },
];

export function assert(condition, message = "assertion failed") {
  if (!condition) throw new Error(message);
}

// Run a check that must not throw; its name says what works.
export async function works(name, check) {
  try {
    await check();
    record(name, null, null);
  } catch (error) {
    console.error(error);
    record(name, null, String(error));
  }
}

// Run a check that the server must refuse, in an error whose text has `naming`.
export async function refused(name, reason, naming, check) {
  try {
    await check();
  } catch (error) {
    const text = `${error} ${error.responseBody ?? ""}`;
    record(name, reason, text.includes(naming) ? null : text);
    return;
  }
  record(name, reason, "was not refused");
}

function record(name, refusal, error) {
  const line = JSON.stringify({ name, refusal, error: error && error.slice(0, 2000) });
  appendFileSync(process.env.NANOVLLM_RESULTS, `${line}\n`);
}
