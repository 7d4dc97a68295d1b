// Vercel's AI SDK with its provider for OpenAI, whose default is the Responses API.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
import { KEY, MODEL, PROMPT, V1, assert, works } from "./checks.mjs";

let sent = "";
const provider = createOpenAI({
  baseURL: V1, apiKey: KEY,
  fetch: (url, init) => {
    sent = init.body;
    return fetch(url, init);
  },
});
const SMALL = { maxOutputTokens: 8, maxRetries: 0 };
const first = [{ role: "user", content: PROMPT }];

// Answer a question and a second one, which the client sends with the first answer.
async function converse(model, options) {
  const { response } = await generateText({ model, messages: first, ...SMALL, ...options });
  const messages = [...first, ...response.messages, { role: "user", content: "And then?" }];
  assert((await generateText({ model, messages, ...SMALL, ...options })).text);
}

await works("responses", async () => {
  const { text, usage } = await generateText({ model: provider(MODEL), prompt: PROMPT, ...SMALL });
  assert(text && usage.outputTokens === 8);
});

await works("streams", async () => {
  for (const model of [provider(MODEL), provider.chat(MODEL), provider.completion(MODEL)]) {
    let text = "";
    const stream = streamText({ model, prompt: PROMPT, ...SMALL, onError: () => {} });
    for await (const piece of stream.textStream) text += piece;
    assert(text);
  }
});

await works("conversations by item references", async () => {
  await converse(provider(MODEL));
  assert(sent.includes("item_reference"), "the client sent no reference");
});

await works("conversations that are not stored", async () => {
  await converse(provider(MODEL), { providerOptions: { openai: { store: false } } });
  assert(!sent.includes("item_reference"), "the client sent a reference");
});

await works("conversations by the previous response", async () => {
  const { response } = await generateText({ model: provider(MODEL), messages: first, ...SMALL });
  const providerOptions = { openai: { previousResponseId: response.id } };
  const model = provider(MODEL);
  assert((await generateText({ model, prompt: "And then?", ...SMALL, providerOptions })).text);
});

await works("conversations of chats", async () => {
  await converse(provider.chat(MODEL));
});
