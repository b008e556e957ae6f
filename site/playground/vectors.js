// Steering vectors: from a pair of prompts, and in files of the library.

import { sha256 } from "./hashing.js";
import { readSafetensors, writeSafetensors } from "./safetensors.js";
import { norm, scaled } from "./sampling.js";
import { LARGEST } from "./settings.js";

const FORMAT = "steering_vector";
const VERSION = "1";
const PLACE = "decoder_block"; // resid_post
// As in the library: two passes that compute the same differ by up to this part of their size.
const NOISE = 2e-5;

/** Something asked for that cannot be done; the message says why, `field` where it was asked. */
export class Refusal extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/**
 * The direction from one prompt's activation to the other's, at norm 1.
 *
 * @param {Float32Array} positive [d_model]
 * @param {Float32Array} negative [d_model]
 * @param {string} where what was read, for the message
 * @returns {Float32Array} [d_model]
 * @throws {Refusal} the two do not differ
 */
export function direction(positive, negative, where) {
  const difference = positive.map((value, i) => value - negative[i]);
  const length = norm(difference);
  if (length <= NOISE * Math.hypot(norm(positive), norm(negative))) {
    throw new Refusal("pair", `${where}, so there is no direction from one to the other.`);
  }
  return scaled(difference, 1 / length);
}

/**
 * The file that `SteeringVector.save` of the library writes for a pair.
 *
 * @param {number} layer
 * @param {Float32Array} vector [d_model], at norm 1
 * @param {string[]} pair the positive and the negative prompt
 * @param {string} modelType
 */
export function vectorFile(layer, vector, pair, modelType) {
  return writeSafetensors(new Map([[`layer.${layer}`, vector]]), {
    format: FORMAT,
    format_version: VERSION,
    layer_type: PLACE,
    d_model: `${vector.length}`,
    model: "embedded",
    model_type: modelType,
    pairs: "1",
    pairs_sha256: sha256(`[[${pair.map(pythonJson).join(", ")}, null, null]]`),
    aggregator: "mean",
    versions: JSON.stringify({ playground: VERSION }),
  });
}

/** A text as Python's `json.dumps` writes it: in ASCII. */
function pythonJson(text) {
  const escaped = (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(text).replace(/[^ -~]/g, escaped);
}

/**
 * Read a steering vector of the library.
 *
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for messages
 * @param {{width: number, layers: number}} model
 * @returns {{layers: Map<number, Float32Array>, size: number, notes: string[]}} the vectors over
 *   `size`, the largest norm among them: at the coefficient `size` they are as they were saved
 * @throws {Refusal} the file holds something else, or a vector for another model or place
 */
export function readVector(bytes, name, model) {
  const refuse = (why) => {
    throw new Refusal("file", `“${name}” ${why}.`);
  };
  let metadata, tensors;
  try {
    ({ metadata, tensors } = readSafetensors(bytes));
  } catch (error) {
    refuse(error.message);
  }
  const names = [...tensors.keys()];
  const ours = metadata.format === FORMAT && "layer_type" in metadata && names.length > 0;
  if (!ours || !names.every((key) => /^layer\.-?\d+$/.test(key))) {
    refuse("is a safetensors file, but holds no steering vector");
  }
  if (metadata.format_version !== VERSION) {
    refuse(`has the format ${metadata.format_version}; this page reads ${VERSION}`);
  }
  if (metadata.layer_type !== PLACE) {
    refuse(`acts on ${metadata.layer_type}; this page steers the residual stream, ${PLACE}`);
  }
  const layers = new Map();
  for (const [key, { shape, data }] of tensors) {
    const number = Number(key.slice("layer.".length));
    const layer = number < 0 ? number + model.layers : number;
    if (layer < 0 || layer >= model.layers) {
      refuse(`steers layer ${number}; this model has layers 0 to ${model.layers - 1}`);
    }
    if (layers.has(layer)) refuse(`has layer ${layer} twice, counted from either end`);
    if (shape.length !== 1 || shape[0] !== model.width) {
      refuse(`has a vector of ${shape.join(" × ")} numbers; this model has ${model.width}`);
    }
    if (!data.every(Number.isFinite)) refuse(`has numbers that are not finite in layer ${layer}`);
    layers.set(layer, data);
  }
  const size = Math.max(...Array.from(layers.values(), norm));
  if (!(size > 0)) refuse("holds a vector that is 0");
  if (size > LARGEST) refuse(`has a norm of ${size.toPrecision(4)}; this page steers up to ${LARGEST}`);
  const sorted = [...layers].sort(([one], [other]) => one - other);
  const other = metadata.model && metadata.model !== "embedded" ? metadata.model : null;
  const notes = other ? [`It was made for “${other}”, another model than this one.`] : [];
  return { layers: new Map(sorted.map(([at, it]) => [at, scaled(it, 1 / size)])), size, notes };
}
