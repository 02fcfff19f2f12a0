// A drafter in JavaScript that guesses by prompt lookup: it looks for an earlier place in the text with the same last few
// tokens, and guesses that the text continues as it did there. It needs no model and works with any vocabulary.
//
//   node drafter.mjs tcp://127.0.0.1:5555

import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { pathToFileURL } from "node:url";
import { Dealer } from "zeromq";
import { ProtocolError, VERSION, decode, encode, prefixChecksum } from "./protocol.mjs";

const ENGINE = "ngram";
const MAX_LENGTH = 1 << 20;
const MAX_GENERATIONS = 256;
const REMEMBERED_REPLIES = 64;
const LONGEST_RUN = 3;
const HELLO_MS = 500;

/** Guesses at most `count` tokens that may follow `tokens`; none if their last token never occurred before. */
export function lookUp(tokens, count) {
  for (let run = Math.min(LONGEST_RUN, tokens.length - 1); run > 0; run--) {
    const end = tokens.slice(-run);
    for (let at = tokens.length - run - 1; at >= 0; at--) {
      if (end.every((token, index) => tokens[at + index] === token)) return tokens.slice(at + run, at + run + count);
    }
  }
  return [];
}

/** What the drafter keeps of one open generation. */
class Session {
  tokens = [];
  cancelledTo = 0n;
  seen = new Set();
  replies = new Map();

  holds(length, checksum) {
    return length <= this.tokens.length && prefixChecksum(this.tokens.slice(0, length)) === checksum;
  }
}

/** Answers requests. It knows nothing of sockets: `react` takes a message and gives the replies to it. */
export class Drafter {
  #sessions = new Map();

  /** Yields the replies to one message of the orchestrator, in order. */
  *react(message) {
    switch (message.type) {
      case "OpenGeneration":
        this.#open(message.generation);
        break;
      case "CloseGeneration":
        this.#sessions.delete(message.generation);
        break;
      case "Cancel": {
        const session = this.#sessions.get(message.generation);
        if (session && message.attempt > session.cancelledTo) session.cancelledTo = message.attempt;
        break;
      }
      case "Draft":
      case "Verify":
      case "Score":
        yield* this.#onRequest(message);
        break;
    }
  }

  #open(generation) {
    if (this.#sessions.has(generation)) return;
    // A Map keeps its order, and each request moves its generation to the end: the first one was idle longest.
    if (this.#sessions.size >= MAX_GENERATIONS) this.#sessions.delete(this.#sessions.keys().next().value);
    this.#sessions.set(generation, new Session());
  }

  *#onRequest(request) {
    const { generation, attempt } = request;
    const session = this.#sessions.get(generation);
    if (!session) {
      yield { type: "Failed", generation, attempt, code: "unknown_generation", message: "it is not open here" };
      return;
    }
    this.#sessions.delete(generation);
    this.#sessions.set(generation, session);
    if (session.seen.has(attempt)) {
      if (session.replies.has(attempt)) yield session.replies.get(attempt);
      return;
    }
    session.seen.add(attempt);
    for (const reply of this.#answer(request, session)) {
      session.replies.set(attempt, { ...reply, generation, attempt });
      yield session.replies.get(attempt);
    }
    if (session.replies.size > REMEMBERED_REPLIES) session.replies.delete(session.replies.keys().next().value);
  }

  *#answer(request, session) {
    const begun = performance.now();
    const busy = () => Math.round((performance.now() - begun) * 1000);
    const fail = (code, message) => ({ type: "Failed", code, message });
    const { base, tokens, start, count, block } = request;
    const end = base + tokens.length;
    if (request.type !== "Draft") return yield fail("request", `this worker is a drafter: it does not answer ${request.type}`);
    if (start < Math.max(end, 1) || count < 1 || block < 1) return yield fail("limit", "start, count or block is out of range");
    if (start + count > MAX_LENGTH) return yield fail("limit", `position ${start + count} is beyond ${MAX_LENGTH}`);
    if (!session.holds(base, request.base_crc)) {
      return yield { type: "NeedPrefix", held: base > session.tokens.length ? session.tokens.length : 0 };
    }
    // Tokens behind `end` stay only if nothing before them changes, and only up to `start`.
    const same = tokens.every((token, index) => session.tokens[base + index] === token);
    if (!same || start === end) session.tokens = session.tokens.slice(0, base).concat(tokens);
    session.tokens.length = Math.min(session.tokens.length, start);
    if (session.tokens.length === 0) return yield fail("limit", "there is no token to continue");
    if (request.attempt <= session.cancelledTo) return yield { type: "Cancelled", forwards: 0, busy_us: busy() };
    let from = session.tokens.length;
    const guesses = lookUp(session.tokens, start + count - from);
    session.tokens.push(...guesses);
    do {
      const tokens = guesses.splice(0, block);
      yield { type: "Drafted", start: from, tokens, done: guesses.length === 0, busy_us: busy() };
      from += tokens.length;
    } while (guesses.length > 0);
  }
}

/** Why this worker cannot be what `welcome` asks for; an empty text if it can. */
export function problemWith(welcome) {
  if (welcome.version !== VERSION) return `the orchestrator speaks version ${welcome.version} of the protocol, this worker version ${VERSION}`;
  if (welcome.role !== "drafter") return `this worker only drafts: it cannot take the role "${welcome.role}"`;
  if (welcome.engine !== ENGINE) return `this worker has the engine "${ENGINE}", not the engine "${welcome.engine}"`;
  return "";
}

/** Serves one orchestrator until it says Goodbye, or is silent for `silence_ms`. */
export async function serve(endpoint) {
  const incarnation = randomBytes(8).readBigUInt64LE();
  const socket = new Dealer({ routingId: `j${incarnation.toString(16)}`, linger: 200, maxMessageSize: 1_114_112 });
  socket.connect(endpoint);
  // The socket refuses a second send while the first one waits, so each send waits for the one before.
  let sending = Promise.resolve();
  const say = (message) => (sending = sending.then(() => socket.send(encode(message))).catch(() => {}));
  const hello = {
    type: "Hello", version: VERSION, incarnation, role: "drafter", engine: ENGINE, model: "", device: "cpu:0",
    host: hostname(), process: process.pid,
  };
  say(hello);
  let heard = Date.now();
  let sequence = 0n;
  let welcome = null;
  let timer = setInterval(() => say(hello), HELLO_MS);
  const beat = () => {
    if (Date.now() - heard > welcome.silence_ms) leave(1, "the orchestrator is gone");
    say({ type: "Heartbeat", incarnation, sequence: ++sequence });
  };
  const leave = (code, why) => {
    console.error(`drafter: ${why}`);
    clearInterval(timer);
    process.exitCode = code;
    sending.finally(() => socket.close());
  };
  process.on("SIGTERM", async () => {
    await say({ type: "Goodbye", reason: "asked to end", again: false });
    leave(0, "done");
  });
  const drafter = new Drafter();
  for await (const frames of socket) {
    heard = Date.now();
    let message;
    try {
      message = decode(frames[0]);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      console.error(`drafter: a frame was dropped: ${error.message}`);
      continue;
    }
    if (message.type === "Goodbye") return leave(welcome ? 0 : 1, `dismissed: ${message.reason}`);
    if (message.type === "Welcome") {
      const problem = problemWith(message);
      if (problem) {
        say({ type: "Failed", generation: 0, attempt: 0, code: "load", message: problem });
        return leave(1, problem);
      }
      if (!welcome) {
        welcome = message;
        clearInterval(timer);
        timer = setInterval(beat, message.heartbeat_ms);
      }
      say({
        type: "Ready", vocabulary: "", vocabulary_size: 0, max_length: MAX_LENGTH, window: 0, latency_us: 50,
        window_latency_us: 0, slots: 16, batch_latency_us: 0, load_ms: 0, fingerprint: 0,
      });
    }
    for (const reply of drafter.react(message)) say(reply);
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  await serve(process.argv[2] ?? "tcp://127.0.0.1:5555");
}
