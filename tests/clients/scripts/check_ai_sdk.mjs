// Vercel's AI SDK with its provider for OpenAI-compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { z } from "zod";
import { DIMENSIONS, KEY, MODEL, PROMPT, V1, assert, refused, works } from "./checks.mjs";

const options = { name: "nanovllm", baseURL: V1, apiKey: KEY };
const provider = createOpenAICompatible({ ...options, supportsStructuredOutputs: true });
const SMALL = { maxOutputTokens: 8, maxRetries: 0 };
const Person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });
const embedding = provider.embeddingModel ?? provider.textEmbeddingModel;

await works("chats", async () => {
  const { text, usage } = await generateText({ model: provider(MODEL), prompt: PROMPT, ...SMALL });
  assert(text && usage.outputTokens === 8);
});

await works("completions", async () => {
  const model = provider.completionModel(MODEL);
  assert((await generateText({ model, prompt: PROMPT, ...SMALL })).text);
});

await works("streams", async () => {
  for (const model of [provider(MODEL), provider.completionModel(MODEL)]) {
    let text = "";
    const stream = streamText({ model, prompt: PROMPT, ...SMALL, onError: () => {} });
    for await (const piece of stream.textStream) text += piece;
    assert(text);
  }
});

await works("conversations", async () => {
  const first = [{ role: "user", content: PROMPT }];
  const { response } = await generateText({ model: provider(MODEL), messages: first, ...SMALL });
  const messages = [...first, ...response.messages, { role: "user", content: "And then?" }];
  assert((await generateText({ model: provider(MODEL), messages, ...SMALL })).text);
});

await works("objects by schema", async () => {
  const { object } = await generateObject({
    model: provider(MODEL), schema: Person, prompt: PROMPT, maxOutputTokens: 200, maxRetries: 0,
  });
  assert(Number.isInteger(object.age));
});

await works("embeddings", async () => {
  const { embeddings } = await embedMany({
    model: embedding.call(provider, MODEL), values: ["one", "two"], maxRetries: 0,
  });
  assert(embeddings[1].length === DIMENSIONS);
});

await refused("tools", "tools are not supported", "tool", () =>
  generateText({
    model: provider(MODEL), prompt: PROMPT, ...SMALL,
    tools: { f: tool({ description: "f", inputSchema: jsonSchema({ type: "object" }) }) },
  }),
);
