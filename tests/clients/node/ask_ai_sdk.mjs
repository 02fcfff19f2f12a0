// Vercel's AI SDK: a text, a stream, an object of a schema, and a tool.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const City = z.strictObject({ name: z.enum(["Oslo", "Rome"]), capital: z.boolean() });
const provider = createOpenAICompatible({
  name: "dsi", baseURL: process.argv[2], apiKey: "any", supportsStructuredOutputs: true,
});
const asked = { model: provider("tiny"), prompt: "Say hello.", temperature: 0, maxRetries: 0 };

const whole = await generateText({ ...asked, maxOutputTokens: 8 });
let text = "";
for await (const piece of streamText({ ...asked, maxOutputTokens: 8 }).textStream) text += piece;
assert.equal(text, whole.text);

const { output } = await generateText({ ...asked, maxOutputTokens: 60, output: Output.object({ schema: City }) });
City.parse(output);

const tools = { city: tool({ description: "Takes a city.", inputSchema: City }) };
const called = await generateText({ ...asked, tools, toolChoice: "required", maxOutputTokens: 300 });
City.parse(called.toolCalls[0].input);
