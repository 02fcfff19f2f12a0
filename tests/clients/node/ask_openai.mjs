// The official client for Node: chat, stream, tools, schemas, the Responses API.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const City = z.strictObject({ name: z.enum(["Oslo", "Rome"]), capital: z.boolean() });
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any", maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const messages = [{ role: "user", content: "Say hello." }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0 });
let text = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0, stream: true }))
  text += chunk.choices[0].delta.content ?? "";
assert.equal(text, whole.choices[0].message.content);

const format = zodResponseFormat(City, "city");
const parsed = await client.chat.completions.parse({ model, messages, response_format: format, max_tokens: 60, seed: 1 });
City.parse(parsed.choices[0].message.parsed);

const tool = { type: "function", function: { name: "city", parameters: z.toJSONSchema(City) } };
const called = await client.chat.completions.create({
  model, messages, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 100, seed: 1,
});
City.parse(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));

const last = await client.responses.stream({ model, input: "Say hello.", max_output_tokens: 8, temperature: 0 }).finalResponse();
assert.ok(last.output_text);

// A client that leaves: the iteration ends, and the connection with it.
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 1000, stream: true })) {
  assert.ok(chunk.choices);
  break;
}
