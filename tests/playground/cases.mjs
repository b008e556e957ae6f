// Computes cases with the modules of the page, in node: `node cases.mjs FOLDER`.
//
// FOLDER has project.json and cases.json, and gets answers.json, logits.bin (float32, in the order
// of the cases, under each condition) and a file for each vector that is saved.

import { readFileSync, writeFileSync } from "node:fs";
import { Playground } from "../../site/playground/steering.js";
import { Generator, randomDirections } from "../../site/playground/sampling.js";
import { readVector, Refusal } from "../../site/playground/vectors.js";

const folder = process.argv[2];
const json = (path) => JSON.parse(readFileSync(path, "utf8"));
const embedded = new URL("../../common/embedded/", import.meta.url);
const project = json(`${folder}/project.json`);
const { cases, texts, saves, loads, random, counted, withFile } = json(`${folder}/cases.json`);
const playground = new Playground(
  new Uint8Array(readFileSync(new URL("model.safetensors", embedded))),
  json(new URL("tokenizer.json", embedded)),
  project,
);

/** What a function gives, or the words in which it refuses. */
function tried(compute) {
  try {
    return compute();
  } catch (error) {
    if (error instanceof Refusal) return { field: error.field, refused: error.message };
    throw error;
  }
}

const logits = [];
const { nextTokens } = playground;
playground.nextTokens = (rows) => {
  logits.push(...rows);
  return nextTokens.call(playground, rows);
};
const answers = cases.map((settings) =>
  tried(() => {
    const ids = playground.ids(settings.prompt, "prompt", "The prompt");
    const events = [...playground.texts(settings)].filter(Boolean);
    const { tokens } = events.find(({ kind }) => kind === "next");
    return { ids, tokens, texts: events.at(-1).texts, events: events.map(({ kind }) => kind) };
  }),
);
const numbers = new Float32Array(logits.length * project.config.vocab_size);
logits.forEach((row, index) => numbers.set(row, index * project.config.vocab_size));
writeFileSync(`${folder}/logits.bin`, numbers);

const saved = saves.map((settings, number) =>
  tried(() => {
    const { name, bytes } = playground.save(settings);
    writeFileSync(`${folder}/saved-${number}.safetensors`, bytes);
    return name;
  }),
);
const loaded = loads.map((name) =>
  tried(() => {
    const bytes = new Uint8Array(readFileSync(`${folder}/${name}`));
    const { layers, size, notes } = readVector(bytes, name, playground.model);
    return { layers: [...layers].map(([layer, it]) => [layer, [...it]]), size, notes };
  }),
);

const tones = counted.map(({ settings, from, count }) => {
  const events = [...playground.tone(settings, from, count)].filter(Boolean);
  return events.flatMap(({ completions }) => completions);
});
const cells = counted.map(({ settings }) => {
  for (const event of playground.map(settings)) if (event?.cells.length) return event.cells;
});

// Last, for it changes the page: with a vector of a file a map is small enough to be filled.
const { name, settings, newTokens, mapCoeffs } = withFile;
playground.useFile(new Uint8Array(readFileSync(`${folder}/${name}`)), name);
const shown = [...playground.texts(settings)].filter(Boolean).at(-1).texts;
playground.project = { ...project, newTokens, mapCoeffs };
const passes = [...playground.map(settings)].flatMap((event) => event?.cells ?? []);

writeFileSync(
  `${folder}/answers.json`,
  JSON.stringify({
    answers,
    saved,
    loaded,
    completions: tones,
    withFile: { texts: shown, passes },
    cells,
    tones: texts.map((text) => playground.words.toned(text).map((it) => [it.start, it.value])),
    decoded: texts.map((text) => playground.tokenizer.decode(playground.tokenizer.encode(text))),
    directions: random.map(([count, seed]) =>
      randomDirections(project.config.n_embd, count, seed).map((row) => [...row]),
    ),
    uniform: random.map(([count, seed]) => {
      const generator = new Generator(seed);
      return Array.from({ length: count }, () => generator.uniform());
    }),
  }),
);
