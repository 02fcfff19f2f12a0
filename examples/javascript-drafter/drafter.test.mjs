// Tests without a network: the golden vectors of ../../protocol, and the drafter itself. Run them with node --test.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { Drafter, lookUp, problemWith } from "./drafter.mjs";
import { ProtocolError, decode, encode, prefixChecksum } from "./protocol.mjs";

// JSON.parse would round whole numbers beyond 2^53, so they are read as BigInt.
const load = (name) => {
  const content = readFileSync(new URL(`../../protocol/vectors/${name}`, import.meta.url), "utf-8");
  return JSON.parse(content.replace(/: (\d{16,})(?=[,\n}])/g, ': {"big": "$1"}'), (_, value) => (typeof value?.big === "string" ? BigInt(value.big) : value));
};
const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
// A u64 field is a BigInt in our messages and a number or a BigInt in the vectors: compare both as text.
const plain = (message) => JSON.parse(JSON.stringify(message, (_, value) => (typeof value === "bigint" ? value.toString() : value)));
const loose = (value) => JSON.parse(JSON.stringify(plain(value), (_, inner) => (typeof inner === "number" ? String(inner) : inner)));

for (const { name, message, wire } of [...load("messages.json").cases, ...load("tolerated.json").cases, ...load("exchange.json").cases]) {
  test(`decode: ${name}`, () => assert.deepEqual(loose(decode(bytes(wire))), loose(message)));
}
for (const { name, message, wire } of load("messages.json").cases) {
  test(`encode: ${name}`, () => {
    const frame = Buffer.from(encode(decode(bytes(wire))));
    if (message.type === "OpenGeneration") assert.deepEqual(decode(frame), decode(bytes(wire)));  // 1.0 is 1 in JavaScript
    else assert.equal(frame.toString("hex"), wire);
  });
}
for (const { name, wire } of load("must_reject.json").cases) {
  test(`refuse: ${name}`, () => assert.throws(() => decode(bytes(wire)), ProtocolError));
}
for (const { tokens, checksum } of load("checksums.json").prefix_checksum.cases) {
  test(`checksum of ${tokens.length} tokens`, () => assert.equal(prefixChecksum(tokens), Number(checksum)));
}

for (const { name, role, steps } of load("replies.json").cases.filter(({ role, rows }) => role === "drafter" && !rows)) {
  test(`reply: ${name}`, () => {
    const drafter = new Drafter();
    for (const { message, replies } of steps) {
      const given = [...drafter.react(message)];
      assert.equal(given.length, replies.length);
      // A vector names only the fields that the specification determines.
      given.forEach((reply, index) => assert.deepEqual(loose({ ...reply, ...replies[index] }), loose(reply)));
      given.forEach((reply, index) => assert.ok(Object.keys(replies[index]).every((field) => field in reply)));
    }
  });
}

test("what followed earlier is guessed again", () => {
  assert.deepEqual(lookUp([1, 2, 3, 4, 9, 1, 2, 3], 2), [4, 9]);
  assert.deepEqual(lookUp([1, 2, 3], 5), []);
});

test("a request is answered once, and its last reply again when it comes again", () => {
  const drafter = new Drafter();
  const say = (message) => [...drafter.react(message)];
  const draft = { type: "Draft", generation: 1n, attempt: 1n, base: 0, base_crc: 0, tokens: [1, 2, 3, 1, 2], start: 5, count: 3, block: 2 };
  assert.equal(say(draft)[0].code, "unknown_generation");
  say({ type: "OpenGeneration", generation: 1n });
  const replies = say(draft);
  assert.deepEqual(replies.map(({ start, tokens, done }) => [start, tokens, done]), [[5, [3, 1], false], [7, [2], true]]);
  assert.deepEqual(say(draft), replies.slice(1));
  say({ type: "Cancel", generation: 1n, attempt: 2n });
  assert.equal(say({ ...draft, attempt: 2n })[0].type, "Cancelled");
  assert.equal(say({ ...draft, attempt: 3n, base: 9, tokens: [] , start: 9 })[0].type, "NeedPrefix");
});

test("a worker says why it cannot be what a Welcome asks for", () => {
  const welcome = { type: "Welcome", version: 1, role: "drafter", engine: "ngram", model: "", options: {}, heartbeat_ms: 250, silence_ms: 10000 };
  assert.equal(problemWith(welcome), "");
  assert.match(problemWith({ ...welcome, version: 2 }), /version 2/);
  assert.match(problemWith({ ...welcome, role: "target" }), /role "target"/);
  assert.match(problemWith({ ...welcome, engine: "no-such-engine" }), /engine "no-such-engine"/);
});
