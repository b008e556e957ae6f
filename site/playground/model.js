// A GPT-2 as Hugging Face computes it. Sums are in float64, what is kept between them in float32.

/**
 * Multiply: Y[row, j] = Σ X[row, i] W[j, i] + bias[j].
 *
 * Four rows at a time and two columns, so that what was loaded is used several times; the sizes
 * are what the compilers of browsers were fastest with.
 *
 * @param {Float32Array} X [rows, n]
 * @param {{weight: Float32Array, bias: ?Float32Array, n: number, m: number}} linear weight [m, n]
 * @param {Float32Array} Y [rows, m]
 * @param {number} rows
 */
function multiply(X, { weight: W, bias, n, m }, Y, rows) {
  let row = 0;
  for (; row + 3 < rows; row += 4) {
    const p = row * n;
    const q = p + n;
    const r = q + n;
    const s = r + n;
    for (let j = 0; j < m; j += 2) {
      const v = j * n;
      const w = v + n;
      let p0 = bias ? bias[j] : 0;
      let p1 = bias ? bias[j + 1] : 0;
      let q0 = p0;
      let q1 = p1;
      let r0 = p0;
      let r1 = p1;
      let s0 = p0;
      let s1 = p1;
      for (let i = 0; i < n; i++) {
        const one = W[v + i];
        const other = W[w + i];
        p0 += X[p + i] * one;
        q0 += X[q + i] * one;
        r0 += X[r + i] * one;
        s0 += X[s + i] * one;
        p1 += X[p + i] * other;
        q1 += X[q + i] * other;
        r1 += X[r + i] * other;
        s1 += X[s + i] * other;
      }
      const at = row * m + j;
      Y[at] = p0;
      Y[at + 1] = p1;
      Y[at + m] = q0;
      Y[at + m + 1] = q1;
      Y[at + 2 * m] = r0;
      Y[at + 2 * m + 1] = r1;
      Y[at + 3 * m] = s0;
      Y[at + 3 * m + 1] = s1;
    }
  }
  for (; row < rows; row++) {
    const p = row * n;
    for (let j = 0; j < m; j += 2) {
      const v = j * n;
      const w = v + n;
      let even0 = 0;
      let even1 = 0;
      let odd0 = 0;
      let odd1 = 0;
      for (let i = 0; i < n; i += 2) {
        const even = X[p + i];
        const odd = X[p + i + 1];
        even0 += even * W[v + i];
        odd0 += odd * W[v + i + 1];
        even1 += even * W[w + i];
        odd1 += odd * W[w + i + 1];
      }
      Y[row * m + j] = even0 + odd0 + (bias ? bias[j] : 0);
      Y[row * m + j + 1] = even1 + odd1 + (bias ? bias[j + 1] : 0);
    }
  }
}

function normalize(X, { weight, bias }, Y, rows, epsilon) {
  const width = weight.length;
  for (let at = 0; at < rows * width; at += width) {
    let mean = 0;
    for (let i = 0; i < width; i++) mean += X[at + i];
    mean /= width;
    let variance = 0;
    for (let i = 0; i < width; i++) variance += (X[at + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / width + epsilon);
    for (let i = 0; i < width; i++) Y[at + i] = (X[at + i] - mean) * scale * weight[i] + bias[i];
  }
}

function gelu(X, size) {
  const factor = Math.sqrt(2 / Math.PI);
  for (let i = 0; i < size; i++) {
    const x = X[i];
    X[i] = 0.5 * x * (1 + Math.tanh(factor * (x + 0.044715 * x * x * x)));
  }
}

/**
 * The keys and values of some texts, and how far each has been read.
 *
 * `steering[row]` is what is added after blocks: by layer a vector [d_model], or null.
 */
export class Cache {
  constructor(model, steering, positions) {
    this.steering = steering;
    this.lengths = steering.map(() => 0);
    this.stride = positions * model.width;
    const rows = () => steering.map(() => new Float32Array(this.stride));
    this.keys = Array.from({ length: model.layers }, rows);
    this.values = Array.from({ length: model.layers }, rows);
  }

  /** Let a text go on from what another one, of another cache, has read. */
  copyRow(row, from, fromRow, width) {
    this.lengths[row] = from.lengths[fromRow];
    const size = this.lengths[row] * width;
    for (let layer = 0; layer < this.keys.length; layer++) {
      this.keys[layer][row].set(from.keys[layer][fromRow].subarray(0, size));
      this.values[layer][row].set(from.values[layer][fromRow].subarray(0, size));
    }
  }
}

export class Model {
  /**
   * @param {Map<string, {shape: number[], data: Float32Array}>} tensors of model.safetensors
   * @param {Object} config config.json
   */
  constructor(tensors, config) {
    this.width = config.n_embd;
    this.heads = config.n_head;
    this.layers = config.n_layer;
    this.positions = config.n_positions;
    this.epsilon = config.layer_norm_epsilon;
    this.end = config.eos_token_id;
    const data = (name) => tensors.get(`transformer.${name}`).data;
    const norm = (name) => ({ weight: data(`${name}.weight`), bias: data(`${name}.bias`) });
    const linear = (name) => {
      // As GPT-2 stores it, [in, out]; turned, so that each output is a run of numbers.
      const [n, m] = tensors.get(`transformer.${name}.weight`).shape;
      const stored = data(`${name}.weight`);
      const weight = new Float32Array(n * m);
      for (let j = 0; j < m; j++) {
        for (let i = 0; i < n; i++) weight[j * n + i] = stored[i * m + j];
      }
      return { weight, bias: data(`${name}.bias`), n, m };
    };
    this.blocks = Array.from({ length: this.layers }, (_, layer) => ({
      first: norm(`h.${layer}.ln_1`),
      attend: linear(`h.${layer}.attn.c_attn`),
      project: linear(`h.${layer}.attn.c_proj`),
      second: norm(`h.${layer}.ln_2`),
      widen: linear(`h.${layer}.mlp.c_fc`),
      narrow: linear(`h.${layer}.mlp.c_proj`),
    }));
    this.last = norm("ln_f");
    this.tokens = data("wte.weight");
    this.places = data("wpe.weight");
    this.vocabulary = this.tokens.length / this.width;
    this.unembed = { weight: this.tokens, bias: null, n: this.width, m: this.vocabulary };
  }

  /**
   * Read more tokens of some texts.
   *
   * @param {Cache} cache it is carried on
   * @param {number[][]} ids for each row the tokens to read; a row with none is left alone
   * @param {?function(number, Float32Array): void} watch called after each block with its layer and
   *   the hidden states [all tokens, d_model], steering included
   * @returns {(?Float32Array)[]} for each row the logits [vocab] after its last token
   */
  read(cache, ids, watch = null) {
    const { width, epsilon } = this;
    const items = ids.flatMap((row, number) => row.map((id) => ({ row: number, id })));
    const count = items.length;
    for (const item of items) item.position = cache.lengths[item.row]++;
    const make = (size) => new Float32Array(count * size);
    const [hidden, normal, mixed, change] = [make(width), make(width), make(width), make(width)];
    const [together, wide] = [make(3 * width), make(4 * width)];
    items.forEach(({ id, position }, item) => {
      for (let i = 0; i < width; i++) {
        hidden[item * width + i] = this.tokens[id * width + i] + this.places[position * width + i];
      }
    });
    const add = () => {
      for (let i = 0; i < hidden.length; i++) hidden[i] += change[i];
    };
    this.blocks.forEach((block, layer) => {
      normalize(hidden, block.first, normal, count, epsilon);
      multiply(normal, block.attend, together, count);
      this.attend(cache, layer, items, together, mixed);
      multiply(mixed, block.project, change, count);
      add();
      normalize(hidden, block.second, normal, count, epsilon);
      multiply(normal, block.widen, wide, count);
      gelu(wide, wide.length);
      multiply(wide, block.narrow, change, count);
      add();
      items.forEach(({ row }, item) => {
        const vector = cache.steering[row]?.get(layer);
        if (vector) for (let i = 0; i < width; i++) hidden[item * width + i] += vector[i];
      });
      watch?.(layer, hidden);
    });
    return this.logits(hidden, ids);
  }

  /** Attention of each item to all of its text so far; the cache gets keys and values. */
  attend(cache, layer, items, together, mixed) {
    const { width, heads } = this;
    const size = width / heads;
    const scale = 1 / Math.sqrt(size);
    const weights = new Float64Array(this.positions);
    items.forEach(({ row, position }, item) => {
      const start = item * 3 * width;
      const keys = cache.keys[layer][row];
      const values = cache.values[layer][row];
      keys.set(together.subarray(start + width, start + 2 * width), position * width);
      values.set(together.subarray(start + 2 * width, start + 3 * width), position * width);
      for (let head = 0; head < heads; head++) {
        const from = head * size;
        let largest = -Infinity;
        for (let place = 0; place <= position; place++) {
          let score = 0;
          for (let i = 0; i < size; i++) {
            score += together[start + from + i] * keys[place * width + from + i];
          }
          weights[place] = score * scale;
          if (weights[place] > largest) largest = weights[place];
        }
        let total = 0;
        for (let place = 0; place <= position; place++) {
          total += weights[place] = Math.exp(weights[place] - largest);
        }
        for (let i = 0; i < size; i++) {
          let sum = 0;
          for (let place = 0; place <= position; place++) {
            sum += weights[place] * values[place * width + from + i];
          }
          mixed[item * width + from + i] = sum / total;
        }
      }
    });
  }

  /** The logits after the last token of each row that was read. */
  logits(hidden, ids) {
    const { width, vocabulary } = this;
    const ends = [];
    let end = 0;
    for (const row of ids) if (row.length) ends.push((end += row.length) - 1);
    const last = new Float32Array(ends.length * width);
    ends.forEach((item, number) => {
      last.set(hidden.subarray(item * width, (item + 1) * width), number * width);
    });
    normalize(last, this.last, last, ends.length, this.epsilon);
    const all = new Float32Array(ends.length * vocabulary);
    multiply(last, this.unembed, all, ends.length);
    let next = 0;
    return ids.map((row) => {
      if (!row.length) return null;
      return all.subarray(next * vocabulary, ++next * vocabulary);
    });
  }
}
