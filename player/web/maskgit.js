// MaskGIT decoding in the browser, as in maskgit_decode of models/dynamics.py. At temperature 0 it
// computes in the same float64; above 0 it uses its own random numbers.

// Random numbers in [0, 1) that depend only on two integers (sfc32 by Chris Doty-Humphrey, from
// PractRand).
export function generator(seed, number) {
  let [a, b, c, counter] = [seed | 0, number | 0, 0x9e3779b9 | 0, 1];
  const next = () => {
    const sum = (((a + b) | 0) + counter++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return (sum >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 15; i++) next(); // until both seeds have reached all bits
  return next;
}

// One pass of `steps`: fill the masked tokens (N) with the highest confidence by the logits (N * V).
// At a temperature above 0 the tokens are sampled, and confidence is their log-probability plus
// Gumbel noise that fades out over the passes.
export function fill(tokens, logits, { mask, step, steps, temperature, random }) {
  const N = tokens.length, V = logits.length / N, T = temperature || 1, open = [], p = new Float64Array(V);
  tokens.forEach((token, i) => {
    if (token !== mask) return;
    const row = logits.subarray(i * V, (i + 1) * V);
    let chosen = 0, sum = 0;
    for (let v = 1; v < V; v++) if (row[v] > row[chosen]) chosen = v;
    const highest = row[chosen];
    for (let v = 0; v < V; v++) sum += p[v] = Math.exp((row[v] - highest) / T);
    let noise = 0;
    if (temperature > 0) {
      let rest = random() * sum;
      chosen = p.findIndex((share) => (rest -= share) < 0);
      if (chosen < 0) chosen = V - 1; // rounding
      const exponential = -Math.log(1 - random()) || Number.MIN_VALUE;
      noise = -temperature * (1 - step / steps) * Math.log(exponential);
    }
    open.push({ i, chosen, confidence: Math.log(p[chosen]) - Math.log(sum) + noise });
  });
  const stillMasked = step === steps ? 0 : Math.floor(N * Math.cos(((Math.PI / 2) * step) / steps));
  open.sort((a, b) => b.confidence - a.confidence || a.i - b.i);
  for (const { i, chosen } of open.slice(0, open.length - stillMasked)) tokens[i] = chosen;
}
