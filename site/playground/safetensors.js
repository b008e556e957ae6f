// Files of safetensors: a header in JSON, then the numbers of every tensor.

/** Every number of 16 bit, by its bits: looking up is faster than computing. */
const HALVES = Float32Array.from({ length: 65536 }, (_, half) => {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
});

/** How many bytes a number of each type has, and how a run of them is read. */
const TYPES = {
  F64: [8, (buffer) => Float32Array.from(new Float64Array(buffer))],
  F32: [4, (buffer) => new Float32Array(buffer)],
  F16: [2, (buffer) => lookedUp(new Uint16Array(buffer))],
  BF16: [2, (buffer) => asFloats(Uint32Array.from(new Uint16Array(buffer), (half) => half << 16))],
};

const asFloats = (patterns) => new Float32Array(patterns.buffer);

function lookedUp(halves) {
  const data = new Float32Array(halves.length);
  for (let i = 0; i < data.length; i++) data[i] = HALVES[halves[i]];
  return data;
}

/**
 * Read a file.
 *
 * @param {Uint8Array} bytes
 * @returns {{metadata: Object<string, string>,
 *   tensors: Map<string, {dtype: string, shape: number[], data: Float32Array}>}}
 * @throws {Error} the file is cut off or is something else; the message goes after the file's name.
 */
export function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wrong = (why) => new Error(`is not a complete safetensors file (${why})`);
  if (bytes.length < 8) throw wrong("it has less than 8 bytes");
  const length = Number(view.getBigUint64(0, true));
  if (length > bytes.length - 8) throw wrong("its header is cut off");
  let header;
  try {
    const text = bytes.subarray(8, 8 + length);
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch {
    throw wrong("its header is no JSON");
  }
  const { __metadata__, ...entries } = header ?? {};
  const metadata = __metadata__ ?? {};
  const texts = Object.values(metadata).every((value) => typeof value === "string");
  if (!texts) throw wrong("its header is of another kind");
  const tensors = new Map();
  const spans = [];
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: ends } = entry ?? {};
    if (!Array.isArray(shape) || !Array.isArray(ends)) throw wrong("its header is of another kind");
    if (!Object.hasOwn(TYPES, dtype)) throw new Error(`holds numbers of the type ${dtype}, expected floats`);
    const [size, read] = TYPES[dtype];
    const count = shape.reduce((product, side) => product * side, 1);
    const start = 8 + length + ends[0];
    if (ends[1] - ends[0] !== count * size) throw wrong(`the size of ${name} is wrong`);
    if (!(ends[0] >= 0)) throw wrong(`${name} begins inside the header`);
    if (start + count * size > bytes.length) throw wrong(`${name} is cut off`);
    const data = read(bytes.slice(start, start + count * size).buffer);
    tensors.set(name, { dtype, shape, data });
    spans.push(ends);
  }
  let end = 0;
  for (const [from, to] of spans.sort(([one], [other]) => one - other)) {
    if (from !== end) throw wrong("its tensors overlap, or there are gaps between them");
    end = to;
  }
  if (8 + length + end < bytes.length) throw wrong("something follows its tensors");
  return { metadata, tensors };
}

/**
 * Write vectors in float32.
 *
 * @param {Map<string, Float32Array>} vectors by name
 * @param {Object<string, string>} metadata
 * @returns {Uint8Array}
 */
export function writeSafetensors(vectors, metadata) {
  const header = { __metadata__: metadata };
  let end = 0;
  for (const [name, { length }] of vectors) {
    header[name] = { dtype: "F32", shape: [length], data_offsets: [end, (end += 4 * length)] };
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const padded = Math.ceil(text.length / 8) * 8; // the numbers begin at a multiple of 8
  const bytes = new Uint8Array(8 + padded + end).fill(32, 8, 8 + padded);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(padded), true);
  bytes.set(text, 8);
  let at = 8 + padded;
  for (const vector of vectors.values()) {
    for (const value of vector) {
      view.setFloat32(at, value, true);
      at += 4;
    }
  }
  return bytes;
}
