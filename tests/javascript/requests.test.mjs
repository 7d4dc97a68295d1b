/** What the page asks the server, and what it makes of the answers. */

import assert from "node:assert/strict";
import test from "node:test";

import {
  branchAt,
  draftsText,
  endText,
  entropyNats,
  generate,
  newChoice,
  rankText,
  speed,
} from "../../nanovllm/pages/assets/client/generation.js";
import { fitMaxTokens, sampleLengths } from "../../nanovllm/pages/assets/client/lengths.js";
import { findEngineId, shortId } from "../../nanovllm/pages/assets/client/request_ids.js";
import { createVocabulary } from "../../nanovllm/pages/assets/client/vocabulary.js";
import { readText } from "../../nanovllm/pages/assets/playground/setting_values.js";
import { curlCommand, pythonProgram } from "../../nanovllm/pages/assets/playground/snippets.js";

test("speed leaves out tokens read with the first unless all were", () => {
  const times = { startedMs: 1000, firstTokenMs: 1500, firstNewToken: 0, status: "done" };
  const read = { ...times, tokens: Array(10).fill(0), lastTokenMs: 2500, numFirst: 4 };
  assert.equal(speed(read).tokensPerS, 6);
  assert.equal(speed({ ...read, lastTokenMs: 1500, numFirst: 10 }).tokensPerS, 20);
  assert.equal(speed({ ...read, firstTokenMs: null }).tokensPerS, null);
});

test("an accepted draft saves a step, unless the text ends before the step's own token", () => {
  const tokens = [null, 1, 1, 2].map((draft) => ({ id: 1, draft }));
  const text = (count, more = {}) =>
    draftsText({ hasDrafts: true, firstNewToken: 0, tokens: tokens.slice(0, count), ...more });
  assert.equal(text(4), "2 of 4 tokens came as drafts, 2 steps saved");
  assert.equal(text(3), "2 of 3 tokens came as drafts, 1 step saved");
  assert.equal(text(4, { firstNewToken: 2 }), "1 of 2 tokens came as drafts, 1 step saved");
  assert.equal(text(0), "0 of 0 tokens came as drafts, 0 steps saved");
  assert.equal(text(4, { hasDrafts: false }), null);
});

test("a link never leads to another prompt", () => {
  const find = (ids, prompt, numPrompts, choice = 0) =>
    findEngineId(ids, { id: "cmpl-a", prompt, numPrompts, choice });
  const all = ["10-cmpl-a", "9-cmpl-a", "11-cmpl-b", "12-cmpl-ab"];
  assert.equal(find(all, 0, 2), "9-cmpl-a");
  assert.equal(find(all, 1, 2), "10-cmpl-a");
  assert.equal(find(all, 0, 3), null);
  assert.equal(find(all, 2, 3), null);
  assert.equal(find(all, 0, 1), "10-cmpl-a");
  assert.equal(find(["3-cmpl-a-0", "4-cmpl-a-1"], 0, 1, 1), "4-cmpl-a-1");
  assert.equal(find([], 0, 1), null);
  assert.equal(shortId("12-cmpl-7435843f99"), "cmpl-7435843f…");
});

test("the entropy is a lower bound, of the alternatives that were asked for", () => {
  const alternatives = [0.5, 0.25, 0.01].map((p, id) => ({ id, logprob: Math.log(p) }));
  const token = { id: 2, logprob: Math.log(0.01), rank: null, alternatives, origin: "sampled" };
  const listed = -[0.5, 0.25, 0.01].reduce((sum, p) => sum + p * Math.log(p), 0);
  assert.ok(Math.abs(entropyNats(token, 2) - (listed - 0.24 * Math.log(0.24))) < 1e-12);
  assert.equal(entropyNats({ ...token, alternatives: [] }, 2), null);
  assert.equal(rankText(token, 2), "not in the top 2");
  assert.equal(rankText(token, 3), "3");
  assert.equal(rankText({ ...token, rank: 70 }, 2), "70");
  assert.equal(rankText({ ...token, id: 9 }, 2), "unknown");
});

test("the tokens of a stream are added to their choices", async () => {
  const sent = [];
  const pieces = [
    { index: 0, prompt_token_ids: [7], token_ids: [1], text: "a" },
    { index: 0, token_ids: [2, 3], text: "b", finish_reason: "stop", stop_reason: "b" },
  ].map((piece) => ({
    ...piece,
    logprobs: {
      token_logprobs: piece.token_ids.map((id) => -id),
      top_logprobs: piece.token_ids.map((id) => ({ [`token_id:${id}`]: -id, "token_id:9": -9 })),
    },
  }));
  const api = {
    async *stream(path, { body }) {
      sent.push({ path, body });
      for (const piece of pieces) yield [{ event: "message", data: { choices: [piece] } }];
    },
  };
  const vocabulary = { load: async () => {} };
  const choice = newChoice(0, 0);
  const options = { signal: new AbortController().signal, onchange: () => {} };
  const body = { prompt: "x", logprobs: 1, request_id: "r" };
  assert.equal(await generate({ api, vocabulary }, body, [choice], options), null);
  assert.equal(sent[0].path, "v1/completions");
  assert.equal(sent[0].body.return_tokens_as_token_ids, true);
  assert.deepEqual(choice.promptIds, [7]);
  assert.deepEqual(
    choice.tokens.map(({ id, logprob }) => [id, logprob]),
    [
      [1, -1],
      [2, -2],
      [3, -3],
    ],
  );
  assert.deepEqual(
    choice.tokens[1].alternatives.map(({ id }) => id),
    [2, 9],
    "the likeliest first",
  );
  assert.deepEqual([choice.status, choice.text, endText(choice)], ["done", "ab", "stop string b"]);
  assert.deepEqual(choice.request, { id: "cmpl-r", prompt: 0, numPrompts: 1, choice: 0 });

  const branch = branchAt(choice, 1, 9);
  assert.deepEqual(
    branch.tokens.map(({ id, origin }) => [id, origin]),
    [
      [1, "kept"],
      [9, "chosen"],
    ],
  );
  assert.equal(branch.firstNewToken, 2);
});

test("a request that fails leaves its message in the choices, one that is stopped none", async () => {
  const vocabulary = { load: async () => {} };
  const options = { signal: new AbortController().signal, onchange: () => {} };
  for (const [name, status] of [
    ["Error", "failed"],
    ["AbortError", "stopped"],
  ]) {
    const failure = Object.assign(new Error("no"), { name });
    const api = {
      stream: () => ({ [Symbol.asyncIterator]: () => ({ next: () => Promise.reject(failure) }) }),
    };
    const choice = newChoice(0, 0);
    const error = await generate({ api, vocabulary }, { messages: [] }, [choice], options);
    assert.equal(choice.status, status);
    assert.equal(error, status === "failed" ? failure : null);
    assert.equal(choice.error, status === "failed" ? "no" : null);
  }
});

test("as many tokens are asked for as fit into the context", async () => {
  const asked = [];
  const api = {
    async post(path, body) {
      asked.push([path, body]);
      return { count: body.prompt?.length ?? 30, max_model_len: 40 };
    },
  };
  const fit = (inputs, limits, maxModelLen = 40) =>
    fitMaxTokens({ api, maxModelLen }, inputs, limits);
  assert.equal(await fit([{ prompt: "aaaa" }], { wanted: 8 }), 8);
  assert.equal(asked.length, 0, "a short prompt needs no count");
  assert.equal(await fit([{ prompt: "a".repeat(36) }], { wanted: 8 }), 4);
  assert.equal(await fit([{ prompt: "aaaa" }, { prompt: "a".repeat(36) }], {}), 4);
  assert.equal(await fit([{ prompt: "a".repeat(50) }], { wanted: 8 }), 8, "the server says why");
  assert.equal(await fit([{ prompt: "a".repeat(50) }], { wanted: 64, truncated: 30 }), 10);
  assert.equal(await fit([{ messages: [{ role: "user", content: "a" }] }], { wanted: 20 }), 10);
  const broken = { post: () => Promise.reject(new Error("no")) };
  assert.equal(
    await fitMaxTokens({ api: broken, maxModelLen: 4 }, [{ prompt: "aaaa" }], { wanted: 8 }),
    8,
  );
  assert.deepEqual(sampleLengths(40, 64), { max_tokens: 20, truncate_prompt_tokens: 20 });
  assert.deepEqual(sampleLengths(null, 64), { max_tokens: 64 });
});

test("tokens are the bytes that the vocabulary spells", async () => {
  let loads = 0;
  const tokens = ["the", "Ġend", "Ã", "©", "Ċ"];
  const vocabulary = createVocabulary({
    async get(path) {
      assert.equal(path, "v1/engine/vocabulary");
      loads += 1;
      if (loads === 1) throw new Error("not yet");
      return { tokens };
    },
  });
  await assert.rejects(vocabulary.load(), /not yet/);
  await Promise.all([vocabulary.load(), vocabulary.load()]);
  assert.equal(loads, 2, "loaded again after an error, then once");
  assert.deepEqual([...vocabulary.bytes(2), ...vocabulary.bytes(3)], [0xc3, 0xa9]);
  assert.deepEqual([0, 1, 2, 4].map(vocabulary.label), ["the", "␣end", "\\xC3", "↵"]);
  assert.equal(vocabulary.join([0, 1, 2, 3]), "the endé");
  assert.equal(vocabulary.join([2]), "\uFFFD");
  assert.deepEqual(vocabulary.word([0, 1, 0], 2), { before: "end", token: "the", after: "" });
});

test("settings are read from the texts of fields", () => {
  assert.deepEqual(readText("seed", "number", " 7 "), { seed: 7 });
  assert.deepEqual(readText("stop", "lines", "\\n\na\\\\n\n"), { stop: ["\n", "a\\n"] });
  assert.deepEqual(readText("ids", "ids", "1, 2 3"), { ids: [1, 2, 3] });
  assert.deepEqual(readText("logit_bias", "bias", "13: -5\n4 2.5"), {
    logit_bias: { 13: -5, 4: 2.5 },
  });
  assert.deepEqual(readText("x", "schema", '{"a": 1}'), { structured_outputs: { json: { a: 1 } } });
  assert.deepEqual(readText("x", "choice", "a\nb"), { structured_outputs: { choice: ["a", "b"] } });
  assert.deepEqual(readText("x", "json", '{"echo": true}'), { echo: true });
  assert.deepEqual(readText("x", "text", "  "), {});
  for (const [kind, text, message] of [
    ["ids", "1, x", /x is no token id/],
    ["bias", "13", /13 is no id and bias/],
    ["bias", "13: 1e999", /no id and bias/],
    ["json", "{", /this is no JSON/],
    ["schema", "[]", /enter a JSON object/],
  ]) {
    assert.throws(() => readText("x", kind, text), message);
  }
});

test("a request becomes a command and a program, without its key", () => {
  const body = { prompt: "it's", top_k: 5, stop: ["\n"], echo: true };
  const curl = curlCommand("http://host/", body, true);
  assert.ok(curl.includes("'http://host/v1/completions'"));
  assert.ok(curl.includes("it'\\''s"));
  assert.ok(curl.includes('"Authorization: Bearer $NANOVLLM_API_KEY"'));
  const program = pythonProgram("http://host/", body, false);
  assert.ok(program.includes('    extra_body={"top_k": 5},\n'));
  assert.ok(program.includes("    echo=True,\n"));
  assert.ok(program.includes('api_key="none"'));
});
