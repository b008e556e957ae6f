// What the page does with the model, without the page: each task is a generator that gives an event
// whenever there is something to show, and in between lets others have their turn.

import { Cache, Model } from "./model.js";
import { readSafetensors } from "./safetensors.js";
import {
  Generator,
  likeliest,
  norm,
  randomDirections,
  sampled,
  scaled,
  softmax,
} from "./sampling.js";
import { CONDITIONS } from "./settings.js";
import { Tokenizer } from "./tokenizer.js";
import { Words } from "./tone.js";
import { direction, readVector, Refusal, vectorFile } from "./vectors.js";

const CHUNK = 48; // tokens of prompts that are read in one go
const BATCH = 4; // completions that are sampled side by side, under each condition
const NEXT = 8; // tokens whose probabilities are shown
const CELL = 8; // completions for each cell of the map in one pass
const PASSES = 2; // over the map

/**
 * @typedef {Object} Settings
 * @property {string} prompt
 * @property {string} toward the positive prompt of the pair
 * @property {string} away the negative one
 * @property {number} layer the vector is added to resid_post of this block, counted from 0
 * @property {number} coeff times the direction
 * @property {number} length of a text, in new tokens
 * @property {boolean} sampled or else the likeliest token each time
 * @property {number} seed of the first sampled text; the next ones have the next seeds
 * @property {number} randomSeed of the random direction
 */

export class Playground {
  /**
   * @param {Uint8Array} weights model.safetensors
   * @param {Object} tokenizer tokenizer.json
   * @param {Object} project what `repository.playground` collects
   */
  constructor(weights, tokenizer, project) {
    this.project = project;
    this.model = new Model(readSafetensors(weights).tensors, project.config);
    this.tokenizer = new Tokenizer(tokenizer);
    this.words = new Words(project);
    this.file = null; // a vector that was dropped in, which then takes the place of the pair's
    this.pair = null; // what was last read of a pair
  }

  // --- what is asked for, checked ---

  /** The token ids of a text that the model can read. */
  ids(text, field, name) {
    const { positions } = this.model;
    if (!text.isWellFormed()) {
      throw new Refusal(field, `${name} has half of a letter that takes two; write it again.`);
    }
    const ids = this.tokenizer.encode(text);
    if (!ids.length) throw new Refusal(field, `${name} is empty: write at least one letter.`);
    if (ids.length > positions) {
      const many = `${name} has ${ids.length} tokens, and the model reads at most ${positions}`;
      throw new Refusal(field, `${many}: shorten it.`);
    }
    return ids;
  }

  /** Use a file of the library in place of the pair; null goes back to the pair. */
  useFile(bytes, name) {
    this.file = bytes && { ...readVector(bytes, name, this.model), name, bytes };
    return this.file;
  }

  /** Both prompts of the pair: their ids, and by layer their hidden states [tokens, d_model]. */
  readPair({ toward, away }) {
    const texts = [toward, away];
    if (this.pair && texts.every((text, side) => text === this.pair.texts[side])) return this.pair;
    const ids = texts.map((text, side) => {
      const name = `The prompt to steer ${side ? "away from" : "toward"}`;
      return this.ids(text, side ? "away" : "toward", name);
    });
    const hidden = ids.map((row) => {
      const found = [];
      this.model.read(new Cache(this.model, [null], row.length), [row], (layer, states) => {
        found[layer] = states.slice();
      });
      return found;
    });
    return (this.pair = { texts, ids, hidden });
  }

  /** By layer the direction that is added, times a coefficient. */
  vector(settings, layer = settings.layer) {
    if (this.file) return this.file.layers;
    const { texts, hidden } = this.readPair(settings);
    const [positive, negative] = hidden.map((side) => side[layer].subarray(-this.model.width));
    const names = texts.map((text) => `“${text}”`).join(" and ");
    const where = `After block ${layer}, ${names} do not differ at their last token`;
    return new Map([[layer, direction(positive, negative, where)]]);
  }

  /** What is added under each condition: by layer a vector, or null. */
  steering(settings) {
    const vector = this.vector(settings);
    const random = randomDirections(this.model.width, vector.size, settings.randomSeed);
    const times = (factor) => (entry) => [entry[0], scaled(entry[1], factor)];
    const control = [...vector].map(([layer, it], number) => [
      layer,
      scaled(random[number], settings.coeff * norm(it)),
    ]);
    return [null, new Map([...vector].map(times(settings.coeff))), new Map(control)];
  }

  /** How many tokens a text may get: as many as asked for, and as the model has places for. */
  room(ids, length) {
    return Math.min(length, this.model.positions - ids.length);
  }

  /** The file of the vector that steers now, and what it is called. */
  save(settings) {
    if (this.file) return { name: this.file.name, bytes: this.file.bytes };
    const [[layer, vector]] = this.vector(settings);
    const pair = [settings.toward, settings.away];
    const words = pair.map((text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-"));
    const name = words.map((word) => word.replace(/^-|-$/g, "").slice(0, 30) || "text").join("-");
    return {
      name: `${name}-layer-${layer}.safetensors`,
      bytes: vectorFile(layer, vector, pair, this.project.config.model_type),
    };
  }

  // --- tasks ---

  /** Read a prompt under each condition; returns the cache, and the logits after it. */
  *readPrompt(ids, steering, room) {
    const cache = new Cache(this.model, steering, ids.length + room);
    const step = Math.max(1, Math.floor(CHUNK / steering.length));
    let logits;
    for (let at = 0; at < ids.length; at += step) {
      logits = this.model.read(cache, steering.map(() => ids.slice(at, at + step)));
      yield null;
    }
    return { cache, logits };
  }

  /**
   * Continue texts until they end; returns the new ids of each.
   *
   * @param {function(Float32Array, number): number} choose a token by the logits and the row
   */
  *continue(cache, logits, room, choose) {
    const texts = logits.map(() => []);
    const open = logits.map(() => true);
    for (let count = 0; count < room; count++) {
      const next = logits.map((row, number) => {
        const id = open[number] ? choose(row, number) : this.model.end;
        if (id === this.model.end) open[number] = false;
        else texts[number].push(id);
        return open[number] ? [id] : [];
      });
      if (!open.some(Boolean)) break;
      yield texts;
      if (count + 1 < room) logits = this.model.read(cache, next);
    }
    return texts;
  }

  /** The three texts, token by token, and before them the next token and where the pair differs. */
  *texts(settings) {
    const ids = this.ids(settings.prompt, "prompt", "The prompt");
    const steering = this.steering(settings);
    const room = this.room(ids, settings.length);
    const tokens = ids.map((id) => this.tokenizer.decode([id]));
    yield { kind: "prompt", tokens, room, cut: room < settings.length };
    const { cache, logits } = yield* this.readPrompt(ids, steering, room);
    yield { kind: "next", tokens: this.nextTokens(logits) };
    const generators = CONDITIONS.map(() => new Generator(settings.seed));
    const choose = (row, number) =>
      settings.sampled ? sampled(row, this.project.topP, generators[number]) : likeliest(row);
    const steps = this.continue(cache, logits, room, choose);
    const shown = (all) => all.map((row) => this.tokenizer.decode(row));
    for (let step = steps.next(); ; step = steps.next()) {
      yield { kind: "texts", texts: shown(step.value), done: Boolean(step.done) };
      if (step.done) return;
    }
  }

  /** The tokens that are likeliest unsteered or steered, with their probabilities under each. */
  nextTokens(logits) {
    const shares = logits.map(softmax);
    const highest = (id) => Math.max(shares[0][id], shares[1][id]);
    const order = Array.from(shares[0].keys()).sort((one, other) => highest(other) - highest(one));
    return order.slice(0, NEXT).map((id) => ({
      token: this.tokenizer.decode([id]),
      probabilities: shares.map((share) => share[id]),
    }));
  }

  /** Where the pair differs: after each block, at each token, |difference| over the mean norm. */
  differences(settings) {
    const { ids, hidden } = this.readPair(settings);
    const { width, layers } = this.model;
    const tokens = ids.map((row) => row.map((id) => this.tokenizer.decode([id])));
    const shared = Math.min(...ids.map((row) => row.length));
    const at = (side, layer, token) =>
      hidden[side][layer].subarray(token * width, (token + 1) * width);
    const shares = Array.from({ length: layers }, (_, layer) =>
      Array.from({ length: shared }, (_, token) => {
        const [one, other] = [at(0, layer, token), at(1, layer, token)];
        const difference = one.map((value, i) => value - other[i]);
        return (2 * norm(difference)) / (norm(one) + norm(other));
      }),
    );
    return { kind: "differences", tokens, shares };
  }

  /** Sample completions under each condition, `from` being the number of the first. */
  *tone(settings, from, count) {
    const ids = this.ids(settings.prompt, "prompt", "The prompt");
    const room = this.room(ids, this.project.newTokens);
    const prompt = yield* this.readPrompt(ids, this.steering(settings), 0);
    for (let start = from; start < from + count; start += BATCH) {
      const size = Math.min(BATCH, from + count - start);
      const rows = CONDITIONS.flatMap((_, row) =>
        Array.from({ length: size }, (_, number) => ({ row, number: start + number })),
      );
      const texts = yield* this.sample(prompt, rows, room, settings.seed);
      yield {
        kind: "tone",
        completions: rows.map(({ row, number }, index) => ({
          ...this.counted(texts[index]),
          condition: CONDITIONS[row],
          number,
        })),
      };
    }
  }

  /**
   * Sample completions of a prompt that was read.
   *
   * @param {{cache: Cache, logits: Float32Array[]}} prompt
   * @param {{row: number, number: number}[]} rows for each completion what row of the prompt it
   *   goes on from, and its number, which decides about its random numbers
   */
  *sample(prompt, rows, room, seed) {
    const { cache, logits } = prompt;
    const steering = rows.map(({ row }) => cache.steering[row]);
    const own = new Cache(this.model, steering, cache.lengths[0] + room);
    rows.forEach(({ row }, index) => own.copyRow(index, cache, row, this.model.width));
    const generators = rows.map(({ number }) => new Generator((seed + number) % 2 ** 32));
    const choose = (row, number) => sampled(row, this.project.topP, generators[number]);
    const first = rows.map(({ row }) => logits[row]);
    const steps = this.continue(own, first, room, choose);
    for (let step = steps.next(); ; step = steps.next()) {
      if (step.done) return step.value;
      yield null;
    }
  }

  /** A completion and its tone: 1, -1, or 0 where as many words are positive as negative. */
  counted(ids) {
    const text = this.tokenizer.decode(ids);
    return { text, sign: Math.sign(this.words.tone(text)) };
  }

  /** The map: for layers and coefficients the share of positive minus negative completions. */
  *map(settings) {
    const ids = this.ids(settings.prompt, "prompt", "The prompt");
    const room = this.room(ids, this.project.newTokens);
    const { preset, mapCoeffs: coeffs } = this.project;
    const layers = this.file ? [null] : Array.from({ length: this.model.layers }, (_, i) => i);
    const cells = layers.flatMap((layer) => coeffs.map((coeff) => ({ layer, coeff, sum: 0 })));
    // Unsteered is the same on every layer, and is sampled once.
    const open = cells.filter(({ layer, coeff }) => coeff !== 0 || layer === layers[0]);
    const far = ({ layer, coeff }) =>
      Math.abs((layer ?? 0) - preset.layer) + Math.abs(coeff) / preset.coeff;
    open.sort((one, other) => far(one) - far(other));
    yield { kind: "map", layers, coeffs, cells: [], done: 0 };
    for (let round = 0; round < PASSES; round++) {
      for (const [number, cell] of open.entries()) {
        const { layer, coeff } = cell;
        const vector = this.vector(settings, layer ?? settings.layer);
        const steering = new Map([...vector].map(([at, it]) => [at, scaled(it, coeff)]));
        const prompt = yield* this.readPrompt(ids, [coeff ? steering : null], 0);
        const rows = Array.from({ length: CELL }, (_, i) => ({ row: 0, number: round * CELL + i }));
        const texts = yield* this.sample(prompt, rows, room, settings.seed);
        for (const text of texts) cell.sum += this.counted(text).sign;
        const share = cell.sum / (CELL * (round + 1));
        const filled = coeff ? [cell] : cells.filter((other) => other.coeff === 0);
        yield {
          kind: "map",
          layers,
          coeffs,
          cells: filled.map((it) => ({ layer: it.layer, coeff, share, count: CELL * (round + 1) })),
          done: (round * open.length + number + 1) / (PASSES * open.length),
        };
      }
    }
  }
}
