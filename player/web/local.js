// The world in a Worker of the browser. It answers the questions listed in server.py, with ONNX
// Runtime instead of PyTorch and with its own random generator. Initial frames, seed and actions
// determine what is played. A saved run also holds the tokens, for play.py --replay.
import { fill, generator } from "./maskgit.js";

const number = new URL(location.href).searchParams.get("world");
const folder = new URL(`worlds/${number}/`, location.href);
let H, W, N, nActions, local, clips; // from world.json and clips.bin
let kind, dynamics, decoder, encoder; // the execution provider and the graphs

async function load() {
  const get = (name) => fetch(new URL(name, folder));
  ({ size: [H, W], actions: { length: nActions }, local } = await (await get("world.json")).json());
  clips = new Uint8Array(await (await get("clips.bin")).arrayBuffer());
  N = local.clips[0].tokens[0][0].length;
  ({ kind, dynamics, decoder } = await choose());
}

// One graph with its temporal cache. The keys and values are inputs and outputs of the graph, and
// stay on the device that runs it.
class Graph {
  constructor(ort, session, shape) {
    Object.assign(this, { ort, session, shape, length: shape[3] });
    this.clear();
  }

  clear() {
    const size = this.shape.reduce((a, b) => a * b);
    const empty = () => new this.ort.Tensor("float32", new Float32Array(size), this.shape);
    this.keep(empty(), empty());
    this.age = 0;
  }

  keep(keys, values) {
    this.keys?.dispose();
    this.values?.dispose();
    Object.assign(this, { keys, values });
  }

  // finished: keep the frame in the cache. → the graph's first output.
  async run(inputs, finished) {
    const int32 = (list) => new this.ort.Tensor("int32", Int32Array.from(list), [list.length]);
    const tokens = int32(inputs.tokens).reshape([1, N]);
    const feeds = { keys: this.keys, values: this.values, age: int32([this.age]), tokens };
    if (inputs.action !== undefined) feeds.action = int32([inputs.action]);
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
  // browsers allow more than one thread only on a cross-origin isolated page
  const threads = Math.min(4, navigator.hardwareConcurrency);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  return ort;
}

async function graphs(kind) {
  const ort = await runtime(kind === "webgpu" ? "jspi" : "wasm");
  const onGpu = { next_keys: "gpu-buffer", next_values: "gpu-buffer" };
  const preferredOutputLocation = kind === "webgpu" ? onGpu : undefined;
  const options = { executionProviders: [kind], preferredOutputLocation };
  const session = (name) =>
    ort.InferenceSession.create(new URL(`${name}.onnx`, folder).href, options);
  const dynamics = new Graph(ort, await session("dynamics"), local.dynamics);
  const decoder = new Graph(ort, await session("decoder"), local.decoder);
  const times = [];
  for (let i = 0; i < 6; i++) {
    const began = performance.now();
    await dynamics.run({ tokens: new Int32Array(N), action: 0 }, true);
    times.push(performance.now() - began);
  }
  return { kind, dynamics, decoder, time: Math.min(...times) };
}

// Time both WebAssembly and WebGPU, because for small worlds WebGPU is often slower. The WebGPU build
// needs JSPI. A fallback adapter is not worth trying.
async function choose() {
  const wasm = await graphs("wasm");
  try {
    const adapter = "Suspending" in WebAssembly && (await navigator.gpu?.requestAdapter());
    if (!adapter || adapter.info?.isFallbackAdapter) return wasm;
    const webgpu = await graphs("webgpu");
    return webgpu.time < wasm.time ? webgpu : wasm;
  } catch (error) {
    console.warn("WebGPU:", error);
    return wasm;
  }
}

// ---- the session, as in player/session.py
// encoded: the clip's tokens and previous actions. history: tokens as in Session.tokens.
let encoded, clip, history, actions, frame, seed = 0;
const actionBefore = (i) => (i ? actions[i - 1] : encoded.previous_actions[0].at(-1));

async function show(tokens) {
  frame = Uint8Array.from(await decoder.run({ tokens }, true));
}

// Fill the caches with frames whose tokens are known, one by one.
async function prime(tokens, previousActions) {
  dynamics.clear();
  decoder.clear();
  for (let t = 0; t < tokens.length; t++) {
    if (t) await dynamics.run({ tokens: tokens[t - 1], action: previousActions[t - 1] }, true);
    await show(tokens[t]);
  }
}

async function primeClip() {
  await prime(encoded.tokens[0], encoded.previous_actions[0]);
  frame = clip.slice(-H * W * 3);
}

async function start(newEncoded, newClip) {
  [encoded, clip, actions, history] = [newEncoded, newClip, [], [newEncoded.tokens[0].at(-1)]];
  await primeClip();
}

async function step(action) {
  const n = actions.length;
  await dynamics.run({ tokens: history[n], action: actionBefore(n) }, true);
  const tokens = new Int32Array(N).fill(local.mask), { mask, steps, temperature } = local;
  const random = generator(seed, n); // a generator per frame, so that frames after a rewind are the same
  for (let step = 1; step <= steps; step++) {
    const logits = await dynamics.run({ tokens, action }, false);
    fill(tokens, logits, { mask, step, steps, temperature, random });
  }
  history.push(tokens);
  actions.push(action);
  await show(tokens);
}

async function rewind(n) {
  const first = Math.max(0, n - local.reach);
  if (first === 0) await primeClip();
  else await prime([history[first]], [actionBefore(first)]);
  actions.length = n;
  history.length = n + 1;
  for (let i = first; i < n; i++) {
    await dynamics.run({ tokens: history[i], action: actionBefore(i) }, true);
    await show(history[i + 1]);
  }
}

// The saved run, as from Session.to_json of player/session.py; play.py --replay reads it.
function toJson() {
  let bytes = "";
  for (let i = 0; i < clip.length; i += 8192) bytes += String.fromCharCode(...clip.subarray(i, i + 8192));
  return {
    what: "nanoworld run", version: 2, world: local.identity,
    shape: [clip.length / (H * W * 3), H, W, 3], clip: btoa(bytes),
    seed, steps: local.steps, temperature: local.temperature, actions: [...actions],
    tokens: history.slice(1).map((tokens) => [...tokens]), half: true,
  };
}

async function answer(question) {
  if (question instanceof Uint8Array) {
    if (question.length !== H * W * 3) throw new Error(`a picture must have ${H * W * 3} bytes`);
    // never WebGPU: the encoder runs once, and computes with 64-bit integers
    const ort = await runtime("wasm"), url = new URL("encoder.onnx", folder).href;
    encoder ??= await ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    const input = new ort.Tensor("float32", Float32Array.from(question), [H, W, 3]);
    const { tokens } = await encoder.run({ frame: input });
    await start({ tokens: [[Array.from(tokens.data)]], previous_actions: [[nActions]] }, question);
  } else if (question.type === "start") {
    const i = question.start, length = clips.length / local.clips.length;
    seed = question.seed;
    await start(local.clips[i], clips.slice(i * length, (i + 1) * length));
  } else if (question.type === "step") {
    await step(question.action);
  } else if (question.type === "rewind") {
    await rewind(question.to);
  } else {
    const tokens = history.map((tokens) => [...tokens]);
    return JSON.stringify({ run: toJson(), tokens, where: kind });
  }
  const reply = new Uint8Array(4 + frame.length);
  new DataView(reply.buffer).setUint32(0, actions.length, true);
  reply.set(frame, 4);
  return reply.buffer;
}

let latest = load(); // a promise: questions are answered one after another
self.onmessage = ({ data }) => {
  const previous = latest;
  latest = (async () => {
    try {
      await previous;
      self.postMessage(await answer(data instanceof Uint8Array ? data : JSON.parse(data)));
    } catch (error) {
      self.postMessage(JSON.stringify({ error: error.message }));
      if (!dynamics) throw error; // loading failed, so the next question fails too
    }
  })();
  latest.catch(() => {});
};
