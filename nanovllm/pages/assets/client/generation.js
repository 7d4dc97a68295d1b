/**
 * Requests to /v1/completions and /v1/chat/completions, and the tokens of their responses.
 *
 * Token ids come from `return_token_ids` and `return_tokens_as_token_ids`: texts would not tell
 * tokens apart that look the same.
 *
 * @typedef {{id: number, logprob: number}} Alternative
 * @typedef {{id: number, logprob: number | null, rank: number | null, alternatives: Alternative[],
 *   draft: number | null, origin: "prompt" | "kept" | "chosen" | "sampled"}} Token `rank` is null
 *   below the alternatives; `draft` is the token that was drafted in its place
 * @typedef {{promptIndex: number, index: number, promptIds: number[], tokens: Token[],
 *   firstNewToken: number, status: "waiting" | "running" | "done" | "stopped" | "failed",
 *   finishReason: string | null, stopReason: string | number | null, error: string | null,
 *   text: string, startedMs: number, firstTokenMs: number | null, lastTokenMs: number | null,
 *   numFirst: number, hasDrafts: boolean,
 *   request: import("./request_ids.js").PromptOfRequest | null}} Choice
 *   `text` is what the server has decoded; `numFirst` tokens arrived together with the first;
 *   `hasDrafts` is whether the server drafts tokens;
 *   `request` is the last one of the choice
 */

import { formatThings, readableText } from "../elements/format.js";
import { newRequestId } from "./request_ids.js";

const KEPT = /** @type {const} */ ("kept");

/**
 * Return a choice that has no tokens yet.
 * @param {number} promptIndex
 * @param {number} index
 * @returns {Choice}
 */
export function newChoice(promptIndex, index) {
  return {
    promptIndex,
    index,
    promptIds: [],
    tokens: [],
    firstNewToken: 0,
    status: "waiting",
    finishReason: null,
    stopReason: null,
    error: null,
    text: "",
    startedMs: performance.now(),
    firstTokenMs: null,
    lastTokenMs: null,
    numFirst: 0,
    hasDrafts: false,
    request: null,
  };
}

/** Return whether a choice can get more tokens. @param {Choice} choice */
export function isOpen({ status }) {
  return status === "waiting" || status === "running";
}

/** Return a choice as it is after a reload, which ends its request. @param {Choice} choice */
export function ended(choice) {
  return isOpen(choice) ? { ...choice, status: /** @type {const} */ ("stopped") } : choice;
}

/**
 * Generate: fill the choices with tokens as they arrive. A body with messages is a chat.
 * @param {{api: typeof import("./api.js"), vocabulary: import("./vocabulary.js").Vocabulary}} tools
 * @param {Record<string, any>} body the request without the fields about streaming
 * @param {Choice[]} choices by the index of the response
 * @param {{signal: AbortSignal, onchange: (choice: Choice) => void}} options
 * @returns {Promise<Error | null>} why it failed
 */
export async function generate({ api, vocabulary }, body, choices, { signal, onchange }) {
  const request = {
    ...named(body, choices, onchange),
    stream: true,
    return_token_ids: true,
    return_drafted_token_ids: true,
    ...(body.logprobs == null ? {} : { return_tokens_as_token_ids: true }),
  };
  const path = "messages" in body ? "v1/chat/completions" : "v1/completions";
  vocabulary.load().catch(() => {}); // beside the first step; awaited below, with its error
  return finish(choices, onchange, async () => {
    for await (const events of api.stream(path, { body: request, signal })) {
      const pieces = events.flatMap((event) => event.data.choices);
      const arrivedMs = performance.now();
      await vocabulary.load();
      const changed = new Set();
      for (const piece of pieces) {
        const choice = choices[piece.index];
        addPiece(choice, piece, arrivedMs);
        changed.add(choice);
      }
      changed.forEach(onchange);
    }
  });
}

/**
 * Score prompts: fill the choices with the tokens of the prompts and their probabilities.
 * @param {{api: typeof import("./api.js"), vocabulary: import("./vocabulary.js").Vocabulary}} tools
 * @param {object} body
 * @param {Choice[]} choices by the index of the response
 * @param {{signal: AbortSignal, onchange: (choice: Choice) => void}} options
 * @returns {Promise<Error | null>} why it failed
 */
export async function score({ api, vocabulary }, body, choices, { signal, onchange }) {
  return finish(choices, onchange, async () => {
    const response = await api.post("v1/completions", named(body, choices, onchange), { signal });
    await vocabulary.load();
    for (const scored of response.choices) {
      const choice = choices[scored.index];
      const positions = scored.prompt_logprobs ?? [];
      choice.tokens = scored.prompt_token_ids.map(
        (/** @type {number} */ id, /** @type {number} */ position) =>
          scoredToken(id, positions[position]),
      );
      choice.status = "done";
      onchange(choice);
    }
  });
}

/**
 * Return a request with an id, and note it in the choices: the engine view finds them by it.
 * @param {Record<string, any>} body
 * @param {Choice[]} choices
 * @param {(choice: Choice) => void} onchange
 */
function named(body, choices, onchange) {
  const id = body.request_id ?? newRequestId();
  const perPrompt = body.n ?? 1;
  const numPrompts = choices.length / perPrompt;
  const prefix = "messages" in body ? "chatcmpl" : "cmpl";
  choices.forEach((choice, index) => {
    const prompt = Math.floor(index / perPrompt);
    choice.request = { id: `${prefix}-${id}`, prompt, numPrompts, choice: index % perPrompt };
    onchange(choice);
  });
  return { ...body, request_id: id };
}

/**
 * Run a request and return its error; its end becomes that of the choices that are not done.
 * @param {Choice[]} choices
 * @param {(choice: Choice) => void} onchange
 * @param {() => Promise<void>} run
 */
async function finish(choices, onchange, run) {
  let status = /** @type {Choice["status"]} */ ("done");
  /** @type {Error | null} */
  let failure = null;
  try {
    await run();
  } catch (/** @type {any} */ error) {
    status = error.name === "AbortError" ? "stopped" : "failed";
    if (status === "failed") failure = error;
  }
  for (const choice of choices) {
    if (choice.status === "done") continue;
    choice.status = status;
    choice.error = failure?.message ?? null;
    onchange(choice);
  }
  return failure;
}

/** @param {string} name such as "token_id:12" */
function toId(name) {
  return Number(name.slice(name.indexOf(":") + 1));
}

/**
 * @param {Choice} choice
 * @param {any} piece
 * @param {number} arrivedMs
 */
function addPiece(choice, piece, arrivedMs) {
  if (piece.prompt_token_ids && !choice.tokens.length) choice.promptIds = piece.prompt_token_ids;
  const drafts = piece.drafted_token_ids;
  if (drafts) choice.hasDrafts = true;
  (piece.token_ids ?? []).forEach((/** @type {number} */ id, /** @type {number} */ index) => {
    const token = sampledToken(id, ...logprobsAt(piece.logprobs, index));
    choice.tokens.push({ ...token, draft: drafts?.[index] ?? null });
    choice.firstTokenMs ??= arrivedMs;
    choice.lastTokenMs = arrivedMs;
    if (arrivedMs === choice.firstTokenMs) choice.numFirst += 1;
  });
  choice.text += piece.text ?? piece.delta?.content ?? "";
  choice.status = "running";
  if (piece.finish_reason) {
    choice.status = "done";
    choice.finishReason = piece.finish_reason;
    choice.stopReason = piece.stop_reason;
  }
}

/**
 * Return the log-probability of a token and those of its alternatives, by "token_id:N".
 * @param {any} logprobs of a completion, or of a chat, where they are lists of objects
 * @param {number} index
 * @returns {[number | null, Record<string, number> | null | undefined]}
 */
function logprobsAt(logprobs, index) {
  if (!logprobs?.content) {
    return [logprobs?.token_logprobs[index] ?? null, logprobs?.top_logprobs[index]];
  }
  const { logprob, top_logprobs: top } = logprobs.content[index];
  return [
    logprob,
    Object.fromEntries(top.map((/** @type {any} */ other) => [other.token, other.logprob])),
  ];
}

/**
 * @param {number} id
 * @param {number | null} logprob
 * @param {Record<string, number> | null | undefined} top log-probabilities by "token_id:N"
 * @returns {Token}
 */
function sampledToken(id, logprob, top) {
  const entries = Object.entries(top ?? {}).map(([name, value]) => [toId(name), value]);
  const alternatives = sorted(entries.map(([other, value]) => ({ id: other, logprob: value })));
  return { id, logprob, rank: null, alternatives, draft: null, origin: "sampled" };
}

/**
 * @param {number} id
 * @param {Record<string, {logprob: number, rank: number}> | null} entries by token id
 * @returns {Token}
 */
function scoredToken(id, entries) {
  const top = Object.entries(entries ?? {});
  const alternatives = top.map(([other, entry]) => ({ id: Number(other), logprob: entry.logprob }));
  const own = entries?.[id];
  return {
    id,
    logprob: own?.logprob ?? null,
    rank: own?.rank ?? null,
    alternatives: sorted(alternatives),
    draft: null,
    origin: "prompt",
  };
}

/** @param {Alternative[]} alternatives */
function sorted(alternatives) {
  return alternatives.sort((first, second) => second.logprob - first.logprob);
}

/**
 * Return the choice that keeps the tokens before a position and replaces the token there.
 * @param {Choice} choice
 * @param {number} position
 * @param {number} id of the alternative
 * @returns {Choice}
 */
export function branchAt(choice, position, id) {
  const replaced = choice.tokens[position];
  const kept = choice.tokens
    .slice(0, position)
    .map((each) => (each.origin === "prompt" ? each : { ...each, origin: KEPT }));
  const chosen = replaced.alternatives.find((other) => other.id === id);
  const logprob = chosen?.logprob ?? null;
  /** @type {Token} */
  const token = { ...replaced, id, logprob, rank: null, draft: null, origin: "chosen" };
  return {
    ...newChoice(choice.promptIndex, choice.index),
    promptIds: choice.promptIds,
    tokens: [...kept, token],
    firstNewToken: position + 1,
  };
}

/** Return the token ids of a choice with its prompt. @param {Choice} choice */
export function allIds(choice) {
  return [...choice.promptIds, ...choice.tokens.map((token) => token.id)];
}

/**
 * Return a token's rank as a text: exact in scored prompts, else its place among the alternatives.
 * @param {Token} token
 * @param {number} count number of alternatives that the request asked for
 */
export function rankText(token, count) {
  if (token.rank !== null) return String(token.rank);
  const place = token.alternatives.findIndex((other) => other.id === token.id);
  if (place < 0) return "unknown";
  return place < count ? String(place + 1) : `not in the top ${count}`;
}

/**
 * Return a lower bound of the entropy at a position, in nats.
 *
 * The response lists the tokens of the highest probabilities. Each other token is at most as likely
 * as the least of these, and as all others together, so that -ln p is at least that of this bound.
 * @param {Token} token
 * @param {number} count number of alternatives that the request asked for
 */
export function entropyNats(token, count) {
  if (!token.alternatives.length) return null;
  const probabilities = token.alternatives.map((other) => Math.exp(other.logprob));
  const rest = Math.max(0, 1 - probabilities.reduce((sum, value) => sum + value, 0));
  // The sampled token may be listed below the alternatives.
  const least = probabilities[Math.min(count, probabilities.length) - 1] ?? 1;
  const listed = probabilities.reduce((sum, p) => sum - (p > 0 ? p * Math.log(p) : 0), 0);
  return listed - (rest > 0 ? rest * Math.log(Math.min(least, rest)) : 0);
}

/**
 * Return what the response says about its speed.
 *
 * Tokens that arrived with the first have no time of their own. Where all did, the speed is that of
 * the whole response (`isWhole`).
 * @param {Choice} choice
 */
export function speed(choice) {
  const count = choice.tokens.length - choice.firstNewToken;
  const { startedMs, firstTokenMs, lastTokenMs, numFirst } = choice;
  if (firstTokenMs === null || lastTokenMs === null)
    return { count, ttftS: null, tokensPerS: null, isWhole: false };
  const isWhole = count === numFirst;
  const seconds = (lastTokenMs - (isWhole ? startedMs : firstTokenMs)) / 1000;
  const numTimed = isWhole ? count : count - numFirst;
  const isKnown = seconds > 0 && (!isWhole || (count > 1 && choice.status !== "running"));
  const tokensPerS = isKnown ? numTimed / seconds : null;
  return { count, ttftS: (firstTokenMs - startedMs) / 1000, tokensPerS, isWhole };
}

/**
 * Return how many new tokens came as drafts and what that saved, or null if the server drafts none.
 *
 * Each step gives the drafted tokens that it accepts and one more, unless the text ends before it.
 * @param {Choice} choice
 */
export function draftsText({ hasDrafts, tokens, firstNewToken }) {
  if (!hasDrafts) return null;
  const areAccepted = tokens.slice(firstNewToken).map(({ id, draft }) => id === draft);
  const count = areAccepted.filter(Boolean).length;
  const saved = formatThings(count - Number(areAccepted.at(-1) ?? false), "step");
  return `${count} of ${formatThings(areAccepted.length, "token")} came as drafts, ${saved} saved`;
}

/** Return why a choice ended, in words. @param {Choice} choice */
export function endText(choice) {
  if (choice.status === "stopped") return "stopped by you";
  if (choice.status === "failed") return "failed";
  if (choice.finishReason === "length") return "stopped at max_tokens";
  if (choice.finishReason !== "stop") return choice.finishReason ?? "";
  const { stopReason } = choice;
  if (stopReason === null) return "stop: end of text";
  const isText = typeof stopReason === "string";
  return isText ? `stop string ${readableText(stopReason)}` : `stop: token ${stopReason}`;
}
