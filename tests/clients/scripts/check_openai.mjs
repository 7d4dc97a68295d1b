// The official client for node.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { DIMENSIONS, KEY, MESSAGES, MODEL, PROMPT, V1, assert, refused, works } from "./checks.mjs";

const client = new OpenAI({ baseURL: V1, apiKey: KEY, maxRetries: 0, timeout: 60_000 });
const Person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });

await works("completions", async () => {
  const answer = await client.completions.create({
    model: MODEL, prompt: [PROMPT, "One day"], n: 2, max_tokens: 8, logprobs: 2, echo: true,
  });
  assert(answer.choices.length === 4 && answer.choices[0].text.startsWith(PROMPT));
});

await works("completion streams", async () => {
  const stream = await client.completions.create({
    model: MODEL, prompt: PROMPT, max_tokens: 8, stream: true,
    stream_options: { include_usage: true },
  });
  let last;
  for await (const chunk of stream) last = chunk;
  assert(last.usage.completion_tokens === 8);
});

await works("chats", async () => {
  const answer = await client.chat.completions.create({
    model: MODEL, messages: MESSAGES, max_completion_tokens: 8, logprobs: true, top_logprobs: 3,
    store: false, metadata: {}, service_tier: "auto",
  });
  assert(answer.choices[0].logprobs.content[0].top_logprobs.length === 3);
});

await works("chat streams", async () => {
  const stream = await client.chat.completions.create({
    model: MODEL, messages: MESSAGES, max_tokens: 8, stream: true,
  });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0].delta.content ?? "";
  assert(text);
});

await works("the stream helper", async () => {
  const runner = client.chat.completions.stream({
    model: MODEL, messages: MESSAGES, max_tokens: 8,
  });
  assert((await runner.finalChatCompletion()).choices[0].message.content);
});

await works("conversations", async () => {
  const first = await client.chat.completions.create({
    model: MODEL, messages: MESSAGES, max_tokens: 8,
  });
  const messages = [...MESSAGES, first.choices[0].message, { role: "user", content: "And then?" }];
  await client.chat.completions.create({ model: MODEL, messages, max_tokens: 8 });
});

await works("schemas by parse", async () => {
  const answer = await client.chat.completions.parse({
    model: MODEL, messages: MESSAGES, max_tokens: 200,
    response_format: zodResponseFormat(Person, "person"),
  });
  assert(Number.isInteger(answer.choices[0].message.parsed.age));
});

await works("embeddings", async () => {
  const answer = await client.embeddings.create({ model: MODEL, input: ["one", "two"] });
  assert(answer.data[1].embedding.length === DIMENSIONS);
});

await works("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert(ids.includes(MODEL) && (await client.models.retrieve(MODEL)).id === MODEL);
});

await works("raw responses", async () => {
  const { response, request_id } = await client.models.list().withResponse();
  assert(response.headers.get("x-request-id") === request_id);
});

await works("aborts and time limits", async () => {
  const body = { model: MODEL, prompt: PROMPT, max_tokens: 400, n: 64, ignore_eos: true };
  const abort = new AbortController();
  setTimeout(() => abort.abort(), 50);
  const aborted = await client.completions.create(body, { signal: abort.signal }).catch((e) => e);
  assert(aborted instanceof OpenAI.APIUserAbortError);
  const late = await client.completions.create(body, { timeout: 20 }).catch((e) => e);
  assert(late instanceof OpenAI.APIConnectionTimeoutError);
});

await works("errors have their classes", async () => {
  const other = await client.models.retrieve("other").catch((e) => e);
  assert(other instanceof OpenAI.NotFoundError && other.error.message);
  const bad = await client.completions
    .create({ model: MODEL, prompt: PROMPT, n: 0 })
    .catch((e) => e);
  assert(bad instanceof OpenAI.BadRequestError && bad.param === "n");
  const denied = await client.withOptions({ apiKey: "no" }).models.list().catch((e) => e);
  assert(denied instanceof OpenAI.AuthenticationError);
});

await refused("tools", "tools are not supported", "tool", () =>
  client.chat.completions.create({
    model: MODEL, messages: MESSAGES, tools: [{ type: "function", function: { name: "f" } }],
  }),
);

await works("responses", async () => {
  const answer = await client.responses.create({
    model: MODEL, input: PROMPT, max_output_tokens: 8, temperature: 0,
  });
  assert(answer.output_text.length > 0);
});
