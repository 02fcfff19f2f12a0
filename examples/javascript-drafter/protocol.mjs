// The wire format: encodes messages (plain objects) as frames (bytes) and decodes them. SPEC.md sections 3 and 4.

import { crc32 } from "node:zlib";
import { decode as unpack, encode as pack } from "@msgpack/msgpack";

export const VERSION = 1;
const MAX_FRAME_BYTES = 1_114_112;
const MAX_LIST = 1 << 18;
const MAX_ITEMS = 1024;
const MAX_NESTING = 8;
const MAX_OPTIONS = 64;
const MAX_TEXT_BYTES = 4096;
const MAX_LONG_TEXT_BYTES = 1 << 18;

export class ProtocolError extends Error {}

const refuse = (why) => {
  throw new ProtocolError(why);
};

const unsigned = (bits) => (value) => {
  const whole = typeof value === "bigint" || Number.isInteger(value);
  if (!whole || value < 0 || BigInt(value) >= 1n << BigInt(bits)) refuse(`not an unsigned integer of ${bits} bits`);
  return bits === 64 ? BigInt(value) : Number(value);
};

const text = (value) => {
  if (typeof value !== "string" || new TextEncoder().encode(value).length > MAX_TEXT_BYTES) refuse("not a short text");
  return value;
};

const longText = (value) => {
  if (typeof value !== "string" || new TextEncoder().encode(value).length > MAX_LONG_TEXT_BYTES) refuse("not a text of that length");
  return value;
};

const finite = (numbers) => (numbers.every(Number.isFinite) ? numbers : refuse("not a finite number"));

const packed = (read) => (value) => {
  if (!(value instanceof Uint8Array) || value.length % 4 || value.length > 4 * MAX_LIST) refuse("not packed numbers");
  const view = new DataView(value.buffer, value.byteOffset, value.length);
  return finite(Array.from({ length: value.length / 4 }, (_, index) => view[read](4 * index, true)));
};

const options = (value) => {
  if (!isMap(value) || Object.keys(value).length > MAX_OPTIONS) refuse("not a map of options");
  for (const [name, option] of Object.entries(value)) {
    text(name);
    if (!["string", "number", "bigint", "boolean"].includes(typeof option)) refuse("options are not nested");
    if (typeof option === "string") text(option);
    if (typeof option === "number") finite([option]);
  }
  return value;
};

// For each kind of field: `read` checks a decoded value and converts it, `write` prepares a value for msgpack.
const KINDS = {
  u32: { read: unsigned(32), write: Number },
  u64: { read: unsigned(64), write: (value) => (BigInt(value) < 1n << 32n ? Number(value) : BigInt(value)) },
  bool: { read: (value) => (typeof value === "boolean" ? value : refuse("not a boolean")), write: Boolean },
  f64: {
    read: (value) => (["number", "bigint"].includes(typeof value) && Math.abs(Number(value)) <= 2 ** 53 ? Number(value) : refuse("not a number")),
    write: Number,
  },
  text: { read: text, write: text },
  longtext: { read: longText, write: longText },
  tokens: { read: packed("getUint32"), write: (tokens) => new Uint8Array(Uint32Array.from(tokens).buffer) },
  lists: {
    read: (value) => (Array.isArray(value) ? value.map((each) => KINDS.tokens.read(each)) : refuse("not a list of token lists")),
    write: (value) => value.map((each) => KINDS.tokens.write(each)),
  },
  floats: { read: packed("getFloat32"), write: (numbers) => new Uint8Array(Float32Array.from(numbers).buffer) },
  options: { read: options, write: options },
};

// [name, kind, optional] of each field. An optional field, marked by a question mark, may be left out.
const fields = (words) =>
  words.split(", ").filter(Boolean).map((word) => {
    const [name, kind] = word.split(" ");
    return [name, kind.replace("?", ""), kind.endsWith("?")];
  });
// The parameters of OpenGeneration, each of them optional. One that is not known is refused, since it would change the tokens.
const SAMPLING = fields("temperature f64, top_k u32, top_p f64, min_p f64, repetition_penalty f64, seed u64, logprobs bool, presence_penalty f64, frequency_penalty f64, biased_tokens tokens, biases floats, bad_words lists, min_tokens u32, stop_tokens tokens, grammar longtext, top_logprobs u32");
const sampling = (way) => (value) => {
  if (!isMap(value)) refuse("not a map of parameters");
  const kinds = new Map(SAMPLING);
  return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, KINDS[kinds.get(name) ?? refuse(`unknown parameter ${name}`)][way](each)]));
};
KINDS.sampling = { read: sampling("read"), write: sampling("write") };
const REQUEST = "generation u64, attempt u64, ";
const MESSAGES = {
  Hello: [1, "version u32, incarnation u64, role text, engine text, model text, device text, host text, process u32"],
  Welcome: [2, "version u32, role text, engine text, model text, options options, heartbeat_ms u32, silence_ms u32"],
  Ready: [3, "vocabulary text, vocabulary_size u32, max_length u32, window u32, latency_us u32, window_latency_us u32, slots u32, batch_latency_us u32, load_ms u32, fingerprint u32, rows u32?, devices u32?"],
  Heartbeat: [4, "incarnation u64, sequence u64"],
  OpenGeneration: [5, "generation u64, prompt_length u32, correlation text, sampling sampling?"],
  CloseGeneration: [6, "generation u64"],
  Draft: [7, REQUEST + "base u32, base_crc u32, tokens tokens, start u32, count u32, block u32, rows u32?, committed u32?"],
  Drafted: [8, REQUEST + "start u32, tokens tokens, done bool, busy_us u32, parents tokens?"],
  Verify: [9, REQUEST + "base u32, base_crc u32, tokens tokens, start u32, parents tokens?, ahead u32?"],
  Verified: [10, REQUEST + "start u32, tokens tokens, logprobs floats, forwards u32, busy_us u32, more bool?, top_tokens tokens?, top_logprobs floats?, cached u32?"],
  Cancel: [11, "generation u64, attempt u64"],
  Cancelled: [12, REQUEST + "forwards u32, busy_us u32"],
  NeedPrefix: [13, REQUEST + "held u32"],
  Failed: [14, REQUEST + "code text, message text"],
  Goodbye: [16, "reason text, again bool?"],
  Preparing: [17, "what text, done_permille u32"],
  Score: [18, REQUEST + "base u32, base_crc u32, tokens tokens, start u32"],
  Scored: [19, REQUEST + "start u32, logprobs floats, done bool, forwards u32, busy_us u32, top_tokens tokens?, top_logprobs floats?"],
};
const BY_NUMBER = new Map(Object.entries(MESSAGES).map(([name, [number, words]]) => [number, [name, fields(words)]]));

/** The frame of `message`, an object with the message's name as `type` and its fields. */
export function encode(message) {
  const [number, words] = MESSAGES[message.type];
  const wire = { type: number };
  for (const [name, kind, optional] of fields(words)) {
    if (!optional || message[name] !== undefined) wire[name] = KINDS[kind].write(message[name]);
  }
  return pack(wire, { useBigInt64: true });
}

/** The message in `frame`. Throws ProtocolError for every frame that the specification forbids, and nothing else. */
export function decode(frame) {
  if (frame.length > MAX_FRAME_BYTES) refuse("the frame is too large");
  const wire = unpackWithinLimits(frame);
  if (!isMap(wire)) refuse("a frame is one map");
  const [name, words] = (["number", "bigint"].includes(typeof wire.type) && BY_NUMBER.get(Number(wire.type))) || refuse("unknown type");
  const message = { type: name };
  for (const [field, kind, optional] of words) {
    if (Object.hasOwn(wire, field)) message[field] = KINDS[kind].read(wire[field]);
    else if (!optional) refuse(`${field} is missing`);
  }
  return message;
}

/** CRC-32 over `tokens` as little-endian u32. `before` is the checksum of the tokens that come before them. */
export function prefixChecksum(tokens, before = 0) {
  return crc32(new Uint8Array(Uint32Array.from(tokens).buffer), before);
}

function unpackWithinLimits(frame) {
  const limits = {
    useBigInt64: true, maxArrayLength: MAX_ITEMS, maxMapLength: MAX_ITEMS, maxExtLength: 0,
    maxStrLength: MAX_FRAME_BYTES, maxBinLength: MAX_FRAME_BYTES,
    mapKeyConverter: (key) => (typeof key === "string" ? key : refuse("keys are text")),
  };
  const utf8 = new TextDecoder("utf-8", { fatal: true });
  try {
    const wire = unpack(frame, limits);
    refuseDeepOrStrange(wire);
    // The library turns invalid UTF-8 into replacement characters. To find it, decode again and look at the raw bytes.
    if (!isAscii(wire)) refuseInvalidText(wire, unpack(frame, { ...limits, rawStrings: true, mapKeyConverter: (key) => (typeof key === "string" ? key : utf8.decode(key)) }), utf8);
    return wire;
  } catch (error) {
    throw new ProtocolError(`not msgpack within the limits: ${error.message}`);
  }
}

function refuseDeepOrStrange(value, depth = 0) {
  if (depth > MAX_NESTING) refuse("nested too deeply");
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return;
  if (!Array.isArray(value) && !isMap(value)) refuse("an extension type");
  for (const inner of Object.values(value)) refuseDeepOrStrange(inner, depth + 1);
}

function isAscii(value) {
  if (typeof value === "string") return /^[\x00-\x7f]*$/.test(value);
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return true;
  return Object.entries(value).every(([key, inner]) => isAscii(key) && isAscii(inner));
}

function refuseInvalidText(value, raw, utf8) {
  if (typeof value === "string") utf8.decode(raw);
  else if (typeof value === "object" && value !== null && !(value instanceof Uint8Array)) {
    for (const [key, inner] of Object.entries(value)) refuseInvalidText(inner, raw[key], utf8);
  }
}

function isMap(value) {
  return value !== null && typeof value === "object" && Object.getPrototypeOf(value) === Object.prototype;
}
