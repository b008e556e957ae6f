// Random numbers, and what is made of them: the same in torch for the same seed.

/** The Mersenne Twister, seeded and read as `torch.Generator().manual_seed(seed)` on the CPU. */
export class Generator {
  /** @param {number} seed from 0 to 2**32 - 1 */
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = 624;
  }

  /** 32 random bits. */
  bits() {
    if (this.next === 624) this.renew();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  renew() {
    const { state } = this;
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** A number from 0 to 1, without 1, as `torch.rand` draws it. */
  uniform() {
    return (this.bits() & 0xffffff) / 2 ** 24;
  }

  /** Normal numbers as `torch.randn` draws them; their count is a multiple of 16. */
  normals(count) {
    const drawn = Float64Array.from({ length: count }, () => this.uniform());
    for (let start = 0; start < count; start += 16) {
      for (let i = start; i < start + 8; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - drawn[i]));
        const angle = 2 * Math.PI * drawn[i + 8];
        drawn[i] = radius * Math.cos(angle);
        drawn[i + 8] = radius * Math.sin(angle);
      }
    }
    return drawn;
  }
}

/** The length of a vector. */
export function norm(vector) {
  return Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
}

/** A vector times a number, in float32. */
export function scaled(vector, factor) {
  return Float32Array.from(vector, (value) => value * factor);
}

/** Directions at norm 1, as `random_directions(width, count, seed)` of the library draws them. */
export function randomDirections(width, count, seed) {
  const drawn = new Generator(seed).normals(width * count);
  return Array.from({ length: count }, (_, number) => {
    const row = drawn.subarray(number * width, (number + 1) * width);
    return scaled(row, 1 / norm(row));
  });
}

/** The likeliest token. */
export function likeliest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** @returns {Float64Array} probabilities [vocab] */
export function softmax(logits) {
  const largest = logits[likeliest(logits)];
  const shares = new Float64Array(logits.length);
  let total = 0;
  for (let id = 0; id < shares.length; id++) total += shares[id] = Math.exp(logits[id] - largest);
  for (let id = 0; id < shares.length; id++) shares[id] /= total;
  return shares;
}

/**
 * Sample a token out of the likeliest ones that together have at least the probability `topP`.
 *
 * One uniform number decides: the tokens lie side by side in the order of their ids, each as wide
 * as its probability.
 */
export function sampled(logits, topP, generator) {
  const probabilities = softmax(logits);
  // Those below this share have less than 1 - topP together, however many they are.
  const least = (1 - topP) / probabilities.length;
  const ids = [];
  for (let id = 0; id < probabilities.length; id++) if (probabilities[id] >= least) ids.push(id);
  const best = ids.map((id) => probabilities[id]).sort((one, other) => other - one);
  let [kept, sum] = [0, 0];
  while (kept < best.length && sum < topP) sum += best[kept++];
  const likely = ids.filter((id) => probabilities[id] >= best[kept - 1]);
  let left = generator.uniform() * likely.reduce((total, id) => total + probabilities[id], 0);
  for (const id of likely) {
    left -= probabilities[id];
    if (left < 0) return id;
  }
  return likely.at(-1);
}
