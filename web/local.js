// The world in the browser, in a Worker: answers the questions of server.py with ONNX Runtime instead of PyTorch, and with a random
// generator of its own. First frames, seed and actions say what is played; a saved run holds the tokens, too, for play.py --replay.
import { fill, generator } from "./maskgit.js";

const number = new URL(location.href).searchParams.get("world");
const folder = new URL(`worlds/${number}/`, location.href);
let H, W, N, nActions, local, clips; // of world.json and clips.bin
let kind, dynamics, decoder, encoder; // what runs the graphs, and the graphs

async function load() {
  ({ size: [H, W], actions: { length: nActions }, local } = await (await fetch(new URL("world.json", folder))).json());
  clips = new Uint8Array(await (await fetch(new URL("clips.bin", folder))).arrayBuffer());
  N = local.clips[0].tokens[0][0].length;
  ({ kind, dynamics, decoder } = await choose());
}

// One graph with its temporal cache: keys and values go in and come out, and stay where the graph runs.
class Graph {
  constructor(ort, session, shape) {
    Object.assign(this, { ort, session, shape, length: shape[3] });
    this.clear();
  }

  clear() {
    const empty = () => new this.ort.Tensor("float32", new Float32Array(this.shape.reduce((a, b) => a * b)), this.shape);
    this.keep(empty(), empty());
    this.age = 0;
  }

  keep(keys, values) {
    this.keys?.dispose();
    this.values?.dispose();
    Object.assign(this, { keys, values });
  }

  // finished: the frame goes into the cache. → the graph's first output.
  async run(inputs, finished) {
    const whole = (list) => new this.ort.Tensor("int32", Int32Array.from(list), [list.length]);
    const feeds = { keys: this.keys, values: this.values, age: whole([this.age]), tokens: whole(inputs.tokens).reshape([1, N]) };
    if (inputs.action !== undefined) feeds.action = whole([inputs.action]);
    const { next_keys, next_values, ...outputs } = await this.session.run(feeds);
    if (finished) {
      this.keep(next_keys, next_values);
      this.age = Math.min(this.age + 1, this.length);
    } else {
      next_keys.dispose();
      next_values.dispose();
    }
    return Object.values(outputs)[0].data;
  }
}

async function runtime(name) {
  const ort = await import(`./runtime/ort.${name}.min.mjs`);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = new URL("runtime/", location.href).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1; // else only one is allowed
  return ort;
}

async function graphs(kind) {
  const ort = await runtime(kind === "webgpu" ? "jspi" : "wasm");
  const where = kind === "webgpu" ? { next_keys: "gpu-buffer", next_values: "gpu-buffer" } : undefined;
  const session = (name, preferredOutputLocation) =>
    ort.InferenceSession.create(new URL(`${name}.onnx`, folder).href, { executionProviders: [kind], preferredOutputLocation });
  const dynamics = new Graph(ort, await session("dynamics", where), local.dynamics);
  const decoder = new Graph(ort, await session("decoder", where), local.decoder);
  const times = [];
  for (let i = 0; i < 6; i++) {
    const began = performance.now();
    await dynamics.run({ tokens: new Int32Array(N), action: 0 }, true);
    times.push(performance.now() - began);
  }
  return { kind, dynamics, decoder, time: Math.min(...times) };
}

// WebGPU is often there and, for small worlds, often slower: both are timed. Its build needs JSPI; and only a real adapter is worth it.
async function choose() {
  const plain = await graphs("wasm");
  try {
    const adapter = "Suspending" in WebAssembly && (await navigator.gpu?.requestAdapter());
    if (!adapter || adapter.info?.isFallbackAdapter) return plain;
    const gpu = await graphs("webgpu");
    return gpu.time < plain.time ? gpu : plain;
  } catch (error) {
    console.warn("WebGPU:", error);
    return plain;
  }
}

// ---- the game, as in game.py
let begun, clip, history, pressed, frame, seed = 0;
const last = () => history.at(-1);
const lastAction = () => (pressed.length ? pressed.at(-1) : begun.led_to[0].at(-1));

async function show(tokens) {
  frame = Uint8Array.from(await decoder.run({ tokens }, true));
}

// The frames of a beginning, whose tokens are known, one by one.
async function begin(tokens, ledTo) {
  dynamics.clear();
  decoder.clear();
  for (let t = 0; t < tokens.length; t++) {
    if (t) await dynamics.run({ tokens: tokens[t - 1], action: ledTo[t - 1] }, true);
    await show(tokens[t]);
  }
}

async function start(beginning, pixels) {
  [begun, clip, pressed, history] = [beginning, pixels, [], [beginning.tokens[0].at(-1)]];
  await begin(begun.tokens[0], begun.led_to[0]);
  frame = pixels.slice(-H * W * 3);
}

async function step(action) {
  await dynamics.run({ tokens: last(), action: lastAction() }, true);
  const tokens = new Int32Array(N).fill(local.mask), { mask, steps, temperature } = local;
  const random = generator(seed, pressed.length); // of this frame alone, so that the way back finds the same frames again
  for (let step = 1; step <= steps; step++) fill(tokens, await dynamics.run({ tokens, action }, false), { mask, step, steps, temperature, random });
  history.push(tokens);
  pressed.push(action);
  await show(tokens);
}

async function rewind(n) {
  const first = Math.max(0, n - local.reach);
  if (first === 0) {
    await begin(begun.tokens[0], begun.led_to[0]);
    frame = clip.slice(-H * W * 3);
  } else {
    await begin([history[first]], [pressed[first - 1]]);
  }
  pressed.length = n;
  history.length = n + 1;
  for (let i = first; i < n; i++) {
    await dynamics.run({ tokens: history[i], action: i ? pressed[i - 1] : begun.led_to[0].at(-1) }, true);
    await show(history[i + 1]);
  }
}

// What Game.record writes; play.py --replay reads it.
function record() {
  let bytes = "";
  for (let i = 0; i < clip.length; i += 8192) bytes += String.fromCharCode(...clip.subarray(i, i + 8192));
  return {
    what: "nanoworld run", version: 2, world: local.identity, shape: [clip.length / (H * W * 3), H, W, 3], clip: btoa(bytes), seed, steps: local.steps,
    temperature: local.temperature, actions: [...pressed], tokens: history.slice(1).map((tokens) => [...tokens]), half: true,
  };
}

async function answer(question) {
  if (question instanceof Uint8Array) {
    if (question.length !== H * W * 3) throw new Error(`a picture must have ${H * W * 3} bytes`);
    const ort = await runtime("wasm"); // always: it runs once, and counts in 64-bit integers
    encoder ??= await ort.InferenceSession.create(new URL("encoder.onnx", folder).href, { executionProviders: ["wasm"] });
    const { tokens } = await encoder.run({ frame: new ort.Tensor("float32", Float32Array.from(question), [H, W, 3]) });
    await start({ tokens: [[Array.from(tokens.data)]], led_to: [[nActions]] }, question);
  } else if (question.type === "start") {
    const length = clips.length / local.clips.length;
    seed = question.seed;
    await start(local.clips[question.start], clips.slice(question.start * length, (question.start + 1) * length));
  } else if (question.type === "step") {
    await step(question.action);
  } else if (question.type === "rewind") {
    await rewind(question.to);
  } else {
    return JSON.stringify({ run: record(), tokens: history.map((tokens) => [...tokens]), where: kind });
  }
  const reply = new Uint8Array(4 + frame.length);
  new DataView(reply.buffer).setUint32(0, pressed.length, true);
  reply.set(frame, 4);
  return reply.buffer;
}

let turn = load(); // one question after another; those that come early wait
self.onmessage = ({ data }) => {
  const before = turn;
  turn = (async () => {
    try {
      await before;
      self.postMessage(await answer(data instanceof Uint8Array ? data : JSON.parse(data)));
    } catch (error) {
      self.postMessage(JSON.stringify({ error: error.message }));
      if (!dynamics) throw error; // nothing can be played: tell the next one, too
    }
  })();
  turn.catch(() => {});
};
