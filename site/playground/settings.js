// What a link holds, and what may be set.

/** What is compared: nothing added, the vector, and a random direction of its norm. */
export const CONDITIONS = ["unsteered", "steered", "random"];
export const LARGEST = 1000; // coefficient
const SEEDS = 2 ** 32;

/** @returns {import("./steering.js").Settings} */
export function defaults({ prompts, preset }) {
  return {
    prompt: prompts[0],
    toward: "Love",
    away: "Hate",
    layer: preset.layer,
    coeff: preset.coeff,
    length: 40,
    sampled: false,
    seed: 0,
    randomSeed: 0,
  };
}

/** For each number: the least, the largest, whether it is whole, and what it is called. */
function limits({ config }) {
  return {
    layer: [0, config.n_layer - 1, true, "the layer"],
    coeff: [-LARGEST, LARGEST, false, "the coefficient"],
    length: [1, config.n_positions - 1, true, "the number of new tokens"],
    seed: [0, SEEDS - 1, true, "the seed of the texts"],
    randomSeed: [0, SEEDS - 1, true, "the seed of the random direction"],
  };
}

/**
 * Read a number that somebody wrote.
 *
 * @returns {{value: ?number, problem: string}} the value is null where there is a problem
 */
export function readNumber(name, text, project) {
  const [least, largest, whole, called] = limits(project)[name];
  const value = text.trim() === "" ? NaN : Number(text);
  const fits = whole ? Number.isInteger(value) : Number.isFinite(value);
  if (fits && value >= least && value <= largest) return { value, problem: "" };
  const kind = whole ? "a whole number" : "a number";
  const problem = `Expected ${kind} from ${least} to ${largest} as ${called}, got “${text}”.`;
  return { value: null, problem: problem.replaceAll("-", "−") };
}

/**
 * Read the settings of a link; what it does not say, or says wrongly, is as by default.
 *
 * @param {string} hash what follows `#` in the address
 * @returns {{settings: Object, problems: string[]}}
 */
export function readLink(hash, project) {
  const settings = defaults(project);
  const problems = [];
  for (const [name, text] of new URLSearchParams(hash)) {
    if (name === "sampled") {
      settings.sampled = text === "1";
      if (!["0", "1"].includes(text)) problems.push(`Expected 0 or 1 as sampled, got “${text}”.`);
    } else if (Object.hasOwn(limits(project), name)) {
      const { value, problem } = readNumber(name, text, project);
      if (problem) problems.push(problem);
      else settings[name] = value;
    } else if (Object.hasOwn(settings, name)) settings[name] = text;
    else problems.push(`The link sets “${name}”, which this page does not know.`);
  }
  return { settings, problems };
}

/** What follows `#` in the address of these settings. */
export function writeLink(settings) {
  return new URLSearchParams({ ...settings, sampled: settings.sampled ? 1 : 0 }).toString();
}
