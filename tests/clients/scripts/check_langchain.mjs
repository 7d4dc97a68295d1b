// LangChain for JavaScript.
import { AIMessage, HumanMessage } from "@langchain/core/messages";
import { ChatOpenAI, OpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { z } from "zod";
import { DIMENSIONS, KEY, MODEL, PROMPT, V1, assert, refused, works } from "./checks.mjs";

const configuration = { baseURL: V1 };
const options = { model: MODEL, apiKey: KEY, configuration, maxRetries: 0, maxTokens: 8 };
const chat = new ChatOpenAI(options);
const Person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });

await works("chats", async () => {
  const answer = await chat.invoke(PROMPT);
  assert(answer.content && answer.usage_metadata.output_tokens === 8);
});

await works("chat streams", async () => {
  let text = "";
  for await (const piece of await chat.stream(PROMPT)) text += piece.content;
  assert(text);
});

await works("conversations", async () => {
  const first = await chat.invoke(PROMPT);
  const turns = [new HumanMessage(PROMPT), first, new HumanMessage("And then?")];
  assert((await chat.invoke(turns)).content);
  assert((await chat.invoke([...turns, new AIMessage("x"), new HumanMessage("a")])).content);
});

await works("completions", async () => {
  assert(await new OpenAI(options).invoke(PROMPT));
});

await works("the responses api", async () => {
  const model = new ChatOpenAI({ ...options, useResponsesApi: true });
  const first = await model.invoke(PROMPT);
  assert(first.text);
  assert((await model.invoke([new HumanMessage(PROMPT), first, new HumanMessage("a")])).text);
});

await works("objects by schema", async () => {
  const model = new ChatOpenAI({ ...options, maxTokens: 200 });
  const answer = await model.withStructuredOutput(Person, { method: "jsonSchema" }).invoke(PROMPT);
  assert(Number.isInteger(answer.age));
});

await works("embeddings", async () => {
  const vectors = await new OpenAIEmbeddings(options).embedDocuments(["one", "two"]);
  assert(vectors[1].length === DIMENSIONS);
});

await refused("tools", "tools are not supported", "tool", () =>
  chat.bindTools([{ type: "function", function: { name: "f", parameters: {} } }]).invoke(PROMPT),
);
