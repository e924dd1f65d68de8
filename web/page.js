// The page: canvases, keys, clock, timeline. Whether a world is behind a socket or in this browser it does not know (channel.js does).
import { connect } from "./channel.js";
import { film, gif, paint } from "./film.js";

const KEPT = 3000; // frames that one can go back to
const $ = (id) => document.getElementById(id);
const say = (text) => ($("notice").textContent = text);
const dice = (n) => Math.floor(Math.random() * n);

const { play, worlds } = await (await fetch("worlds.json")).json();
const info = await Promise.all(worlds.map(async (_, i) => (await fetch(`worlds/${i}/world.json`)).json()));

// A screen: one world, its frames so far, and who presses its buttons.
class Screen {
  constructor(number, random = false) {
    Object.assign(this, { number, random, world: info[number], channel: connect(number, play), open: 0, latency: 0, action: 0, hold: 0 });
    this.figure = document.createElement("figure");
    this.canvas = document.createElement("canvas");
    this.caption = document.createElement("figcaption");
    [this.canvas.height, this.canvas.width] = this.world.size;
    this.figure.append(this.canvas, this.caption);
    $("screens").append(this.figure);
    this.clear();
  }

  clear() {
    [this.frames, this.first, this.at, this.turn] = [[], 0, 0, (this.turn ?? 0) + 1];
    this.back = false; // true while the visitor looks at an earlier frame
  }

  // Ask for a frame. One that was asked for before the last start or way back comes too late and is dropped.
  async ask(question) {
    const { turn } = this, asked = performance.now();
    this.open++;
    try {
      const { number, frame } = await this.channel.ask(question);
      if (turn !== this.turn) return;
      this.latency += (performance.now() - asked - this.latency) * (this.latency ? 0.1 : 1);
      if (!this.frames.length) this.first = number;
      this.frames[number - this.first] = frame;
      if (this.frames.length > KEPT) this.first += this.frames.splice(0, this.frames.length - KEPT).length;
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

  // Go on from the frame that is shown. What came after it, if anything, is forgotten: this is how one branches.
  step(action) {
    if (this.back && this.at < this.last) {
      this.frames.length = this.at - this.first + 1;
      this.turn++;
      this.ask({ type: "rewind", to: this.at }).catch(fail);
    }
    this.back = false;
    if (this.random) {
      if (this.hold-- <= 0) [this.action, this.hold] = [dice(this.world.actions.length), dice(8)];
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
let once = false; // one frame, as soon as it can be
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

// ---- which action: the newest key or button that is still down; else nothing, if the world has an action for that, else the last one
const down = new Map(); // what holds it → action
let resting = world.idle ?? 0;
const held = () => (down.size ? [...down.values()].at(-1) : resting);
function press(source, action) {
  down.delete(source);
  down.set(source, action);
  if (world.idle === null) resting = action;
  say("");
  light();
}
function release(source) {
  down.delete(source);
  light();
}
function releaseAll() {
  down.clear();
  light();
}
function light() {
  document.body.dataset.action = held();
  document.querySelectorAll("#actions button").forEach((button, i) => button.classList.toggle("held", i === held()));
}

const byCode = new Map();
world.actions.forEach(({ key, arrow }, i) => {
  if (key) byCode.set(/\d/.test(key) ? `Digit${key}` : `Key${key.toUpperCase()}`, i);
  if (/^\d$/.test(key)) byCode.set(`Numpad${key}`, i);
  if (arrow) byCode.set(`Arrow${arrow[0].toUpperCase()}${arrow.slice(1)}`, i);
});
const commands = { Space: () => pause(!paused), Period: () => stepOnce(), KeyR: () => restart() };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const action = byCode.get(event.code);
  if (action === undefined && !commands[event.code]) return;
  event.preventDefault(); // no scrolling, no button pressed by Space
  if (event.repeat && event.code !== "Period") return;
  action === undefined ? commands[event.code]() : press(event.code, action);
});
addEventListener("keyup", (event) => { if (event.code === "Space") event.preventDefault(); release(event.code); });
addEventListener("blur", releaseAll);
document.addEventListener("visibilitychange", () => { if (document.hidden) { releaseAll(); pause(true); } });

// ---- buttons with their legend: what the picture does while the action is held
const picture = async (path) => createImageBitmap(await (await fetch(path)).blob());
const [H, W] = world.size;
const thumbnail = () => Object.assign(document.createElement("canvas"), { width: W, height: H });
const legends = world.actions.map(({ key, label, arrow }, i) => {
  const button = document.createElement("button"), canvas = thumbnail(), text = document.createElement("small");
  text.textContent = label || `action ${i}`;
  const arrows = { left: "←", right: "→", up: "↑", down: "↓" };
  button.append(canvas, [key, arrows[arrow]].filter(Boolean).join("  "), text);
  button.setAttribute("aria-label", `action ${i} ${label}`);
  button.addEventListener("pointerdown", (event) => { event.preventDefault(); button.setPointerCapture(event.pointerId); press(button, i); });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => release(button));
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  $("actions").append(button);
  return canvas.getContext("2d");
});
function animate(legend) {
  let beat = 0;
  const n = legend.width / W;
  setInterval(() => {
    beat = (beat + 1) % (n + 3); // rests on the last frame
    legends.forEach((context, i) => context.drawImage(legend, Math.min(beat, n - 1) * W, i * H, W, H, 0, 0, W, H));
  }, 1000 / world.fps);
}

// ---- beginnings
let beginning; // how the game began: a function of the screen
async function begin(how) {
  if (screens.some((screen) => screen.open > 8)) return; // the link is slow; what was asked for comes first
  beginning = how;
  once = false;
  say("");
  try {
    await Promise.all(screens.map(how));
  } catch (error) {
    fail(error);
  }
}
function restart(start = dice(world.starts)) {
  const seed = dice(2 ** 31);
  return begin((screen) => screen.start(start, seed));
}
picture("worlds/0/starts.png").then((row) => {
  for (let i = 0; i < world.starts; i++) {
    const button = document.createElement("button"), canvas = thumbnail();
    canvas.getContext("2d").drawImage(row, i * W, 0, W, H, 0, 0, W, H);
    button.append(canvas);
    button.setAttribute("aria-label", `start ${i}`);
    button.onclick = () => restart(i);
    $("starts").append(button);
  }
});

async function drop(file) {
  if (!file) return;
  if (file.size > 2 ** 24) return say(`${file.name} is larger than 16 MB`);
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    return say(`${file.name} is not a picture that this browser can read`);
  }
  if (image.width * image.height > 2 ** 26) return say(`${file.name} has more than 64 million pixels`);
  begin((screen) => {
    const [h, w] = screen.world.size, canvas = new OffscreenCanvas(w, h), context = canvas.getContext("2d");
    const side = Math.min(image.width, image.height); // the middle square
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, w, h);
    const { data } = context.getImageData(0, 0, w, h);
    return screen.startFrom(Uint8Array.from(data.filter((_, i) => i % 4 < 3)));
  });
}
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
addEventListener("dragleave", () => document.body.classList.remove("drop"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("drop"); drop(event.dataTransfer.files[0]); });
$("picture").querySelector("input").onchange = ({ target }) => {
  drop(target.files[0]);
  target.value = ""; // the same file may be chosen again
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
    await beginning(second);
    screens.push(second);
    begin(beginning); // both, from the beginning
  } catch (error) { // no place for another game: the first goes on
    second.remove();
    event.target.value = first.caption.textContent = "";
    say(error.message);
  }
};

// ---- the clock: a frame when it is due, never two to catch up, and never more than two on their way
function stepAll() {
  due = Math.max(due + 1000 / (world.fps * Number($("speed").value)), performance.now());
  for (const screen of screens) screen.step(held()).catch(fail);
}
const ready = (screen) => screen.frames.length && screen.open < (screen.back ? 1 : 2); // before a way back nothing is on its way
setInterval(() => {
  if (!once && (paused || performance.now() < due - 2) || !screens.every(ready)) return;
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
  const { latency } = screens[0];
  $("speedometer").textContent = `${drawn / screens.length} frames/s · ${latency.toFixed(0)} ms to answer`;
  Object.assign(document.body.dataset, { fps: drawn / screens.length, latency: latency.toFixed(1) });
  drawn = 0;
}, 1000);

// ---- saving
function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
// The frames of all screens side by side, up to the one shown.
function shown() {
  const [{ world: { size: [h, w] } }] = screens;
  const same = screens.filter((screen) => String(screen.world.size) === String([h, w]));
  const rows = same.map((screen) => screen.frames.slice(0, screen.at - screen.first + 1));
  const frames = Array.from({ length: Math.min(...rows.map((row) => row.length)) }, (_, i) => {
    if (rows.length === 1) return rows[0][i];
    const wide = new Uint8Array(h * w * 3 * rows.length);
    for (let y = 0; y < h; y++) rows.forEach((row, r) => wide.set(row[i].subarray(y * w * 3, (y + 1) * w * 3), (y * rows.length + r) * w * 3));
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
$("gif").onclick = saving(() => download(gif(...shown(), world.fps), `${world.name}.gif`));
$("mp4").onclick = saving(async () => {
  const blob = await film(...shown(), world.fps, (share) => say(`filming … ${Math.round(100 * share)} %`));
  say("");
  download(blob, `${world.name}.${blob.type.endsWith("mp4") ? "mp4" : "webm"}`);
});
$("json").onclick = saving(async () => {
  const { run } = await screens[0].channel.ask({ type: "save" });
  run.actions.length = screens[0].at; // up to the frame shown
  download(new Blob([JSON.stringify(run)], { type: "application/json" }), `${world.name}.json`);
});

light();
await restart(0);
document.body.dataset.ready = "yes";
picture("worlds/0/legend.png").then(animate, fail); // last: a server makes it, in some seconds, while the game is on
if (play === "local") screens[0].channel.ask({ type: "save" }).then(({ where }) => ($("where").textContent = `in this browser, by ${where}`));
