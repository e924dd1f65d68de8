// Frames (Uint8Array, H·W·3 of RGB each) → a Blob to save, as GIF or film. Both repeat each pixel
// `scale` times in both directions.

const channels = (c) => [c >> 16, (c >> 8) & 255, c & 255];

// counts: colour → how often. → at most 256 colours: all of them, or by median cut (Heckbert 1982).
// Median cut splits the box with the largest product of pixels and longest side, at the median of
// that side, until there are 256 boxes; each gives its mean colour.
function choosePalette(counts) {
  const measure = (colours) => {
    const total = colours.reduce((sum, c) => sum + counts.get(c), 0);
    const widths = [0, 1, 2].map((k) => {
      const values = colours.map((c) => channels(c)[k]);
      return values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b));
    });
    const width = Math.max(...widths);
    return { colours, total, side: widths.indexOf(width), size: total * width };
  };
  const boxes = [measure([...counts.keys()])];
  while (boxes.length < Math.min(256, counts.size)) {
    const widest = boxes.reduce((best, box, i) => (box.size > boxes[best].size ? i : best), 0);
    const [{ colours, total, side }] = boxes.splice(widest, 1);
    colours.sort((a, b) => channels(a)[side] - channels(b)[side]);
    let cut = 0, passed = 0;
    do passed += counts.get(colours[cut++]); while (passed < total / 2 && cut < colours.length - 1);
    boxes.push(measure(colours.slice(0, cut)), measure(colours.slice(cut)));
  }
  return boxes.map(({ colours, total }) => {
    const sum = (k) => colours.reduce((sum, c) => sum + channels(c)[k] * counts.get(c), 0);
    const [r, g, b] = [0, 1, 2].map((k) => Math.round(sum(k) / total));
    return (r << 16) | (g << 8) | b;
  });
}

// GIF89a; appendix F of its specification describes the codes.
export function gif(frames, [H, W], fps, scale = 4) {
  const colour = (frame, i, exact) => exact
    ? (frame[i] << 16) | (frame[i + 1] << 8) | frame[i + 2]
    : ((frame[i] & 0xf8) << 16) | ((frame[i + 1] & 0xf8) << 8) | (frame[i + 2] & 0xf8) | 0x040404;
  const count = (exact) => {
    const counts = new Map();
    for (const frame of frames) for (let i = 0; i < frame.length; i += 3) {
      const c = colour(frame, i, exact);
      counts.set(c, (counts.get(c) ?? 0) + 1);
      if (exact && counts.size > 256) return null;
    }
    return counts;
  };
  const exact = count(true), palette = choosePalette(exact ?? count(false));
  const index = new Map(palette.map((c, i) => [c, i]));
  const nearest = (c) => { // and store it in index
    let best = 0, least = Infinity;
    palette.forEach((p, i) => {
      const d = channels(p).reduce((sum, value, k) => sum + (value - channels(c)[k]) ** 2, 0);
      if (d < least) [best, least] = [i, d];
    });
    index.set(c, best);
    return best;
  };

  const parts = [], short = (n) => [n & 255, n >> 8], width = W * scale, height = H * scale;
  const table = new Uint8Array(768);
  palette.forEach((c, i) => table.set(channels(c), 3 * i));
  parts.push("GIF89a", new Uint8Array([...short(width), ...short(height), 0xf7, 0, 0]), table);
  // loop forever
  parts.push(new Uint8Array([0x21, 0xff, 11]), "NETSCAPE2.0", new Uint8Array([3, 1, 0, 0, 0]));
  const delay = short(Math.round(100 / fps)), size = [...short(width), ...short(height)];
  for (const frame of frames) {
    const small = new Uint8Array(H * W);
    for (let i = 0; i < small.length; i++) {
      const c = colour(frame, 3 * i, exact);
      small[i] = index.get(c) ?? nearest(c);
    }
    const pixels = new Uint8Array(width * height);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      pixels[y * width + x] = small[Math.floor(y / scale) * W + Math.floor(x / scale)];
    }
    parts.push(new Uint8Array([0x21, 0xf9, 4, 0, ...delay, 0, 0, 0x2c, 0, 0, 0, 0, ...size, 0, 8]));
    const bytes = compress(pixels);
    for (let i = 0; i < bytes.length; i += 255) {
      const block = bytes.slice(i, i + 255);
      parts.push(new Uint8Array([block.length]), new Uint8Array(block));
    }
    parts.push(new Uint8Array([0]));
  }
  parts.push(new Uint8Array([0x3b]));
  return new Blob(parts, { type: "image/gif" });
}

// LZW with 8-bit symbols and codes of 9 to 12 bits, least significant bit first.
function compress(pixels) {
  const bytes = [], clear = 256, end = 257;
  let bits = 0, held = 0, size = 9, next = 258, codes = new Map();
  const emit = (code) => {
    held |= code << bits;
    for (bits += size; bits >= 8; bits -= 8, held >>>= 8) bytes.push(held & 255);
  };
  emit(clear);
  let prefix = pixels[0];
  for (let i = 1; i < pixels.length; i++) {
    const key = (prefix << 8) | pixels[i], known = codes.get(key);
    if (known !== undefined) { prefix = known; continue; }
    emit(prefix);
    codes.set(key, next);
    if (next++ === 1 << size) size++;
    if (next > 4095) {
      emit(clear);
      [size, next, codes] = [9, 258, new Map()];
    }
    prefix = pixels[i];
  }
  emit(prefix);
  if (next === 1 << size && size < 12) size++; // the reader has added an entry for the last prefix
  emit(end);
  if (bits) bytes.push(held & 255);
  return bytes;
}

// Film a canvas with the browser's own encoder, in real time: MP4 if it can write that, else WebM.
export async function film(frames, [H, W], fps, progress, scale = 8) {
  const types = ["video/mp4;codecs=avc1", "video/mp4", "video/webm"];
  const type = types.find((t) => globalThis.MediaRecorder?.isTypeSupported(t));
  if (!type) throw new Error("this browser cannot make films; save a GIF");
  const canvas = new OffscreenCanvas(W, H), screen = document.createElement("canvas");
  [screen.width, screen.height] = [W * scale, H * scale];
  const context = screen.getContext("2d");
  context.imageSmoothingEnabled = false;
  const stream = screen.captureStream(0), [track] = stream.getVideoTracks(), pieces = [];
  const recorder = new MediaRecorder(stream, { mimeType: type, videoBitsPerSecond: 4e6 });
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const stopped = new Promise((resolve, reject) => {
    recorder.onstop = resolve;
    recorder.onerror = () => reject(new Error("the browser's film encoder failed; save a GIF"));
  });
  recorder.start();
  for (let i = 0; i < frames.length; i++) {
    paint(canvas, frames[i], [H, W]);
    context.drawImage(canvas, 0, 0, screen.width, screen.height);
    track.requestFrame();
    progress((i + 1) / frames.length);
    await new Promise((resolve) => setTimeout(resolve, 1000 / fps));
  }
  recorder.stop();
  await stopped;
  return new Blob(pieces, { type: type.split(";")[0] });
}

export function paint(canvas, frame, [H, W]) {
  const image = new ImageData(W, H);
  for (let i = 0, j = 0; i < frame.length; j += 4) {
    image.data[j] = frame[i++];
    image.data[j + 1] = frame[i++];
    image.data[j + 2] = frame[i++];
    image.data[j + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
