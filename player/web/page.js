// The page: canvases, keys, clock, timeline. Only channel.js knows whether a world runs on a server
// or in this browser.
import { connect } from "./channel.js";
import { film, gif, paint } from "./film.js";

const KEPT = 3000; // frames kept for going back
const $ = (id) => document.getElementById(id);
const say = (text) => ($("notice").textContent = text);
const randomInt = (n) => Math.floor(Math.random() * n);

const { play, worlds } = await (await fetch("worlds.json")).json();
const info = await Promise.all(
  worlds.map(async (_, i) => (await fetch(`worlds/${i}/world.json`)).json()),
);

// A screen: one world, its frames so far, and whether its actions are random or the visitor's.
class Screen {
  constructor(number, random = false) {
    Object.assign(this, {
      number, random, world: info[number], channel: connect(number, play),
      open: 0, latency: 0, action: 0, hold: 0,
    });
    this.figure = document.createElement("figure");
    this.canvas = document.createElement("canvas");
    this.caption = document.createElement("figcaption");
    [this.canvas.height, this.canvas.width] = this.world.size;
    this.figure.append(this.canvas, this.caption);
    $("screens").append(this.figure);
    this.clear();
  }

  clear() {
    [this.frames, this.first, this.at, this.branch] = [[], 0, 0, (this.branch ?? 0) + 1];
    this.back = false; // true while the visitor looks at an earlier frame
  }

  // Ask for a frame. If a start or rewind comes before the answer, the answer is dropped.
  async ask(question) {
    const { branch } = this, asked = performance.now();
    this.open++;
    try {
      const { number, frame } = await this.channel.ask(question);
      if (branch !== this.branch) return;
      this.latency += (performance.now() - asked - this.latency) * (this.latency ? 0.1 : 1);
      if (!this.frames.length) this.first = number;
      this.frames[number - this.first] = frame;
      const excess = this.frames.length - KEPT;
      if (excess > 0) this.first += this.frames.splice(0, excess).length;
      this.show(this.back ? this.at : number);
      drawn++;
    } finally {
      this.open--;
    }
  }

  get last() { return this.first + this.frames.length - 1; }

  show(number) {
    this.at = Math.min(Math.max(number, this.first), this.last);
    if (this.frames.length) paint(this.canvas, this.frames[this.at - this.first], this.world.size);
    if (this === screens[0]) {
      Object.assign($("timeline"), { min: this.first, max: this.last, value: this.at });
      $("clock").textContent = this.at;
    }
  }

  start(start, seed) {
    this.clear();
    return this.ask({ type: "start", start: start % this.world.starts, seed });
  }

  startFrom(pixels) {
    this.clear();
    return this.ask(pixels);
  }

  // Continue from the frame that is shown. Later frames are dropped, so this can start a branch.
  step(action) {
    if (this.back && this.at < this.last) {
      this.frames.length = this.at - this.first + 1;
      this.branch++;
      this.ask({ type: "rewind", to: this.at }).catch(fail);
    }
    this.back = false;
    if (this.random) {
      if (this.hold-- <= 0) {
        [this.action, this.hold] = [randomInt(this.world.actions.length), randomInt(8)];
      }
    } else {
      this.action = Math.min(action, this.world.actions.length - 1);
    }
    return this.ask({ type: "step", action: this.action });
  }

  remove() {
    this.channel.close();
    this.figure.remove();
  }
}

let drawn = 0, paused = false, due = 0;
let once = false; // make one frame as soon as possible
const fail = (error) => { if (error.message !== "closed") { pause(true); say(error.message); } };
const screens = [];
screens.push(new Screen(0));
const world = screens[0].world;
$("name").textContent = document.title = world.name;

function pause(on) {
  paused = on;
  once = false;
  due = 0;
  $("pause").textContent = on ? "play" : "pause";
}

// ---- the action: that of the newest key or button that is still down. If none is down, it is the
// world's idle action, or, in a world without one, the last action.
const down = new Map(); // key or button → action
let resting = world.idle ?? 0;
const held = () => (down.size ? [...down.values()].at(-1) : resting);
function press(source, action) {
  down.delete(source);
  down.set(source, action);
  if (world.idle === null) resting = action;
  say("");
  highlight();
}
function release(source) {
  down.delete(source);
  highlight();
}
function releaseAll() {
  down.clear();
  highlight();
}
function highlight() {
  document.body.dataset.action = held();
  document.querySelectorAll("#actions button")
    .forEach((button, i) => button.classList.toggle("held", i === held()));
}

const byCode = new Map();
world.actions.forEach(({ key, arrow }, i) => {
  if (key) byCode.set(/\d/.test(key) ? `Digit${key}` : `Key${key.toUpperCase()}`, i);
  if (/^\d$/.test(key)) byCode.set(`Numpad${key}`, i);
  if (arrow) byCode.set(`Arrow${arrow[0].toUpperCase()}${arrow.slice(1)}`, i);
});
const commands = { Space: () => pause(!paused), Period: () => stepOnce(), KeyR: () => restart() };

addEventListener("keydown", (event) => {
  const modified = event.ctrlKey || event.metaKey || event.altKey;
  if (modified || event.target.tagName === "SELECT") return;
  const action = byCode.get(event.code);
  if (action === undefined && !commands[event.code]) return;
  event.preventDefault(); // keys must not scroll, and Space must not click a button
  if (event.repeat && event.code !== "Period") return;
  action === undefined ? commands[event.code]() : press(event.code, action);
});
addEventListener("keyup", (event) => {
  if (event.code === "Space") event.preventDefault();
  release(event.code);
});
addEventListener("blur", releaseAll);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    releaseAll();
    pause(true);
  }
});

// ---- a button per action; its picture shows what happens while the action is held
const picture = async (path) => createImageBitmap(await (await fetch(path)).blob());
const [H, W] = world.size;
const thumbnail = () => Object.assign(document.createElement("canvas"), { width: W, height: H });
const legends = world.actions.map(({ key, label, arrow, twin }, i) => {
  const button = document.createElement("button"), canvas = thumbnail();
  const text = document.createElement("small");
  text.textContent = label || `action ${i}`;
  if (twin !== null) text.textContent += `, like ${world.actions[twin].key}`;
  button.style.order = twin === null ? 0 : 1; // actions that do what another does come last
  const arrows = { left: "←", right: "→", up: "↑", down: "↓" };
  button.append(canvas, [key, arrows[arrow]].filter(Boolean).join("  "), text);
  button.setAttribute("aria-label", `action ${i} ${label}`);
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    press(button, i);
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    button.addEventListener(end, () => release(button));
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  $("actions").append(button);
  return canvas.getContext("2d");
});
function animate(legend) {
  let column = 0;
  const n = legend.width / W;
  setInterval(() => {
    column = (column + 1) % (n + 3); // pauses on the last frame
    legends.forEach((context, i) => {
      context.drawImage(legend, Math.min(column, n - 1) * W, i * H, W, H, 0, 0, W, H);
    });
  }, 1000 / world.fps);
}

// ---- initial frames
let startScreen; // the last start, as a function of the screen
async function startAll(start) {
  if (screens.some((screen) => screen.open > 8)) return; // a slow link has to catch up first
  startScreen = start;
  once = false;
  say("");
  try {
    await Promise.all(screens.map(start));
  } catch (error) {
    fail(error);
  }
}
function restart(start = randomInt(world.starts)) {
  const seed = randomInt(2 ** 31);
  return startAll((screen) => screen.start(start, seed));
}
picture("worlds/0/starts.png").then((row) => {
  for (let i = 0; i < world.starts; i++) {
    const button = document.createElement("button"), canvas = thumbnail();
    canvas.getContext("2d").drawImage(row, i * W, 0, W, H, 0, 0, W, H);
    button.append(canvas);
    button.setAttribute("aria-label", `initial frame ${i}`);
    button.onclick = () => restart(i);
    $("starts").append(button);
  }
});

async function startFromFile(file) {
  if (!file) return;
  if (file.size > 2 ** 24) return say(`${file.name} is larger than 16 MB`);
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    return say(`${file.name} is not a picture that this browser can read`);
  }
  if (image.width * image.height > 2 ** 26) {
    return say(`${file.name} has more than 64 million pixels`);
  }
  startAll((screen) => {
    const [h, w] = screen.world.size, canvas = new OffscreenCanvas(w, h);
    const context = canvas.getContext("2d");
    const side = Math.min(image.width, image.height); // the middle square
    const x = (image.width - side) / 2, y = (image.height - side) / 2;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, x, y, side, side, 0, 0, w, h);
    const { data } = context.getImageData(0, 0, w, h);
    return screen.startFrom(Uint8Array.from(data.filter((_, i) => i % 4 < 3)));
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("drop");
});
addEventListener("dragleave", () => document.body.classList.remove("drop"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  startFromFile(event.dataTransfer.files[0]);
});
$("picture").querySelector("input").onchange = ({ target }) => {
  startFromFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
  target.blur();
};

// ---- side by side
info.slice(1).forEach(({ name }, i) => $("beside").append(new Option(name, i + 1)));
$("beside").onchange = async (event) => {
  const choice = event.target.value, [first] = screens;
  event.target.blur();
  screens.splice(1).forEach((screen) => screen.remove());
  first.caption.textContent = choice ? "your keys" : "";
  if (!choice) return;
  const random = choice === "random", second = new Screen(random ? 0 : Number(choice), random);
  second.caption.textContent = random ? "random actions" : second.world.name;
  try {
    await startScreen(second);
    screens.push(second);
    startAll(startScreen); // both from the same initial frame
  } catch (error) { // the second cannot start (too many games, for example); the first continues
    second.remove();
    event.target.value = first.caption.textContent = "";
    say(error.message);
  }
};

// ---- the clock: a frame when it is due, no catching up, and at most two pending frames
function stepAll() {
  due = Math.max(due + 1000 / (world.fps * Number($("speed").value)), performance.now());
  for (const screen of screens) screen.step(held()).catch(fail);
}
// a rewind waits until no frame is pending
const ready = (screen) => screen.frames.length && screen.open < (screen.back ? 1 : 2);
setInterval(() => {
  const early = paused || performance.now() < due - 2;
  if ((!once && early) || !screens.every(ready)) return;
  once = false;
  stepAll();
}, 4);
function stepOnce() {
  pause(true);
  once = true;
}
$("pause").onclick = () => pause(!paused);
$("one").onclick = stepOnce;
$("restart").onclick = () => restart();
$("speed").onchange = (event) => { due = 0; event.target.blur(); };
$("timeline").oninput = (event) => {
  pause(true);
  const to = Math.min(Number(event.target.value), ...screens.map((screen) => screen.last));
  for (const screen of screens) {
    screen.back = true;
    screen.show(to);
  }
};

setInterval(() => {
  const { latency } = screens[0], fps = drawn / screens.length;
  $("speedometer").textContent = `${fps} frames/s · ${latency.toFixed(0)} ms latency`;
  Object.assign(document.body.dataset, { fps, latency: latency.toFixed(1) });
  drawn = 0;
}, 1000);

// ---- saving
function download(blob, name) {
  const href = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
// The frames of all screens side by side, up to the one shown.
function shownFrames() {
  const [{ world: { size: [h, w] } }] = screens;
  const same = screens.filter((screen) => String(screen.world.size) === String([h, w]));
  const rows = same.map((screen) => screen.frames.slice(0, screen.at - screen.first + 1));
  const length = Math.min(...rows.map((row) => row.length));
  const frames = Array.from({ length }, (_, i) => {
    if (rows.length === 1) return rows[0][i];
    const wide = new Uint8Array(h * w * 3 * rows.length);
    for (let y = 0; y < h; y++) {
      rows.forEach((row, r) => {
        const line = row[i].subarray(y * w * 3, (y + 1) * w * 3);
        wide.set(line, (y * rows.length + r) * w * 3);
      });
    }
    return wide;
  });
  return [frames, [h, w * rows.length]];
}
const saving = (make) => async () => {
  pause(true);
  try {
    await make();
  } catch (error) {
    say(error.message);
  }
};
$("gif").onclick = saving(() => download(gif(...shownFrames(), world.fps), `${world.name}.gif`));
$("mp4").onclick = saving(async () => {
  const progress = (share) => say(`making the film … ${Math.round(100 * share)} %`);
  const blob = await film(...shownFrames(), world.fps, progress);
  say("");
  download(blob, `${world.name}.${blob.type.endsWith("mp4") ? "mp4" : "webm"}`);
});
$("json").onclick = saving(async () => {
  const { run } = await screens[0].channel.ask({ type: "save" });
  run.actions.length = screens[0].at; // up to the frame shown
  const blob = new Blob([JSON.stringify(run)], { type: "application/json" });
  download(blob, `${world.name}.json`);
});

highlight();
await restart(0);
document.body.dataset.ready = "yes";
// last, because a server needs some seconds to make it, while the visitor plays
picture("worlds/0/legend.png").then(animate, fail);
if (play === "local") {
  screens[0].channel.ask({ type: "save" })
    .then(({ where }) => ($("where").textContent = `runs in this browser (${where})`));
}
