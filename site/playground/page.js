// The page: settings go to the worker, and what it finds is shown.

import { CONDITIONS, defaults, readLink, readNumber, writeLink } from "./settings.js";
import { Words } from "./tone.js";
import {
  counts,
  element,
  marked,
  moveInMap,
  program,
  showDifferences,
  showMap,
  showNext,
  showSamples,
  showTokens,
  showTone,
  signed,
} from "./views.js";

const COUNT = 24; // sampled texts under each condition, at first and for each press of the button
const LARGEST_FILE = 10e6; // bytes
const TYPING = 200; // ms after the last key until the model begins

const $ = (id) => document.getElementById(id);
const json = (id) => JSON.parse($(id).textContent);

const project = json("project");
const words = new Words(project);
const cards = Object.fromEntries(
  CONDITIONS.map((name) => [name, document.querySelector(`.card.${name}`)]),
);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const start = readLink(location.hash.slice(1), project);
let settings = start.settings;
let file = null; // {name, size, notes, layers} of the vector that was dropped in
let request = 0; // answers to earlier ones are late
let mapRequest = 0; // counts down: the map goes on while other settings are tried
let map = null;
const wrongNumbers = { exact: "", length: "", seed: "", random: "" }; // by field, in words
let completions, room, timer;

// --- the worker ---

function startWorker() {
  // A classic script: from disk, browsers start no worker that is a module.
  const source = new Blob([$("worker").textContent], { type: "text/javascript" });
  const made = new Worker(URL.createObjectURL(source));
  made.onmessage = ({ data }) => {
    if ([undefined, request, mapRequest].includes(data.request)) shown[data.kind](data);
  };
  made.onerror = (event) => {
    $("problem").textContent = `The page has a fault of its own (${event.message}): reload it.`;
    state("failed");
  };
  made.postMessage({
    kind: "load",
    weights: $("weights").textContent,
    tokenizer: json("tokenizer"),
    project,
  });
  return made;
}

/** Tell readers of the screen, and programs, how far the page is. */
function state(name, text = "") {
  document.body.dataset.state = name;
  if (text) $("status").textContent = text;
}

/** Write the texts for the settings as they are now. */
function run() {
  clearTimeout(timer);
  request += 1;
  state("writing");
  for (const id of ["prompt", "pair", "file"]) say(id, "");
  $("problem").textContent = "";
  completions = Object.fromEntries(CONDITIONS.map((name) => [name, []]));
  $("more").disabled = true;
  $("tone-notes").textContent = "";
  showSettings();
  showAllTone();
  worker.postMessage({ kind: "texts", settings, request });
  if (!file) worker.postMessage({ kind: "differences", settings, request });
}

function countTone() {
  const from = completions.unsteered.length;
  $("more").disabled = true;
  worker.postMessage({ kind: "tone", settings, from, count: COUNT, request });
}

function fillMap() {
  mapRequest -= 1;
  worker.postMessage({ kind: "map", settings, request: mapRequest });
}

/** The map belongs to a prompt, a direction and a seed. */
function clearMap() {
  worker.postMessage({ kind: "map", settings: null });
  mapRequest -= 1;
  map = null;
  delete document.body.dataset.map;
  $("progress").style.setProperty("--done", 0);
  $("fill").textContent = "Fill the map";
  showMapNow();
}

// --- what the worker says ---

const shown = {
  ready() {
    $("fill").disabled = false;
    run();
  },
  refused({ field, message, request: of }) {
    if (of === mapRequest) $("fill").textContent = "Fill the map";
    const place = { toward: "pair", away: "pair" }[field] ?? field;
    say(place, message, field);
    if (field === "file") return; // what steered before goes on
    if (field === "prompt") {
      $("code").textContent = $("prompt-notes").textContent = "";
      showTokens($("tokens"), [], words);
    }
    for (const name of CONDITIONS) showText(name, null);
    state("refused", message);
  },
  prompt({ tokens, room: places, cut }) {
    room = places;
    showTokens($("tokens"), tokens, words);
    const strange = words.untaught(settings.prompt).map(({ word }) => word);
    const note = strange.length ? `The grammar never taught: ${strange.join(", ")}.` : "";
    $("prompt-notes").textContent = note;
    const { n_positions: positions } = project.config;
    $("text-notes").textContent = cut
      ? `The model has ${positions} positions: after this prompt there is room for ${room} tokens.`
      : "";
    showProgram();
  },
  next({ tokens }) {
    showNext($("next"), tokens);
  },
  texts({ texts, done }) {
    if (calm.matches && !done) return;
    CONDITIONS.forEach((name, index) => showText(name, texts[index], done));
    if (!done) return;
    // Not sooner: browsers refuse addresses that change with every move of a slider.
    history.replaceState(null, "", `#${writeLink(settings)}`);
    state("written", "Written. Now sampling texts to count their tone.");
  },
  tone({ completions: found }) {
    for (const { condition, text, sign } of found) completions[condition].push({ text, sign });
    showAllTone();
  },
  map({ layers, coeffs, cells, done }) {
    map ??= { layers, coeffs, cells: new Map() };
    for (const cell of cells) map.cells.set(`${cell.layer} ${cell.coeff}`, cell);
    $("progress").style.setProperty("--done", done);
    showMapNow();
  },
  differences(found) {
    showDifferences($("differences"), found, settings, settings.layer);
    const [one, other] = found.tokens.map((row) => row.length);
    $("pair-notes").textContent =
      one === other ? "" : `The prompts have ${one} and ${other} tokens: their last ones count.`;
    const strange = [settings.toward, settings.away].flatMap((text) => words.untaught(text));
    if (strange.length) {
      const list = strange.map(({ word }) => word).join(", ");
      $("pair-notes").textContent += ` The grammar never taught: ${list}.`;
    }
  },
  finished({ task, request: of }) {
    if (task === "texts" && of === request) countTone();
    if (task === "tone") {
      $("more").disabled = false;
      state("counted", toneSummary());
    }
    if (task === "map") {
      $("fill").textContent = "Fill the map again";
      state(document.body.dataset.state, "The map is full.");
      document.body.dataset.map = "full";
    }
  },
  file(found) {
    file = found.layers ? found : null;
    if (file && Math.abs(file.size - 1) > 1e-3) {
      settings.coeff = Number(file.size.toPrecision(6));
    }
    clearMap();
    showFields();
    run();
  },
  saved({ name, bytes }) {
    const address = URL.createObjectURL(new Blob([bytes]));
    element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    $("file-notes").classList.remove("hint");
    $("file-notes").textContent = `Saved as ${name}; SteeringVector.load of the library reads it.`;
  },
};

// --- what is shown ---

function say(id, message, field = id) {
  $(`${id}-error`).textContent = message;
  for (const name of { pair: ["toward", "away"] }[id] ?? [id]) {
    const wrong = message !== "" && (field === name || field === "pair");
    $(name).setAttribute("aria-invalid", `${wrong}`);
  }
}

/** Say what is wrong in a field of a number; what is wrong in the others stays. */
function sayNumber(id, problem) {
  wrongNumbers[id] = problem;
  $(id).setAttribute("aria-invalid", `${problem !== ""}`);
  const { exact, ...others } = wrongNumbers;
  $("coeff-error").textContent = exact;
  $("numbers-error").textContent = Object.values(others).filter(Boolean).join(" ");
}

function names() {
  const { coeff, toward, away } = settings;
  const short = (text) => {
    const letters = [...text]; // some take two places of a text
    return letters.length > 24 ? `${letters.slice(0, 23).join("")}…` : text;
  };
  const end = file ? "the file" : short(coeff < 0 ? away : toward);
  return {
    unsteered: "Unsteered",
    steered: coeff === 0 ? "Steered by 0" : `${file ? "By" : "Toward"} ${end}, ${signed(coeff)}`,
    random: "A random direction",
  };
}

function showText(name, text, done) {
  const [place, count] = cards[name].querySelectorAll(".text, .count");
  if (text === null) {
    place.replaceChildren("–");
    count.textContent = "";
    return;
  }
  const prompt = element("span", { class: "given" }, settings.prompt);
  place.replaceChildren(prompt, ...marked(text, words));
  place.classList.toggle("writing", !done);
  count.textContent = done ? counts(text, words) : "";
}

function showAllTone() {
  const tally = {};
  for (const name of CONDITIONS) {
    tally[name] = [1, 0, -1].map(
      (sign) => completions[name].filter((it) => it.sign === sign).length,
    );
  }
  showTone($("tone"), tally, names());
  if ($("samples").parentElement.open) showAllSamples();
  const count = completions.unsteered.length;
  $("tone-notes").textContent = count ? `${count} texts each, top_p ${project.topP}` : "";
}

function showAllSamples() {
  const texts = {};
  for (const name of CONDITIONS) texts[name] = completions[name].map((it) => it.text);
  showSamples($("samples"), texts, names(), words);
}

function toneSummary() {
  const parts = CONDITIONS.map((name) => {
    const up = completions[name].filter(({ sign }) => sign > 0).length;
    const down = completions[name].filter(({ sign }) => sign < 0).length;
    return `${names()[name]}: ${up} positive, ${down} negative.`;
  });
  return `Of ${completions.unsteered.length} sampled texts each: ${parts.join(" ")}`;
}

function showMapNow() {
  const layers = file ? [null] : Array.from({ length: project.config.n_layer }, (_, i) => i);
  const empty = { layers, coeffs: project.mapCoeffs, cells: new Map() };
  showMap($("map"), map ?? empty, settings);
}

/** What follows from the settings without the model. */
function showSettings() {
  const { coeff, toward, away } = settings;
  document.body.dataset.way = coeff < 0 ? "away" : coeff > 0 ? "toward" : "none";
  const known = names();
  for (const name of CONDITIONS) cards[name].querySelector("h3").textContent = known[name];
  const ends = file ? ["−", "0", "+"] : [`− ${away}`, "0", `+ ${toward}`];
  $("coeff-ends").replaceChildren(...ends.map((end) => element("span", {}, end)));
  $("coeff").setAttribute("aria-valuetext", known.steered);
  showMapNow();
  showProgram();
  $("address").hidden = true;
  $("link-notes").textContent = file ? "The link holds the settings, not the file." : "";
  document.querySelector("[aria-labelledby=differences-title]").hidden = Boolean(file);
  if (file) $("pair-notes").textContent = "";
}

function showProgram() {
  $("code").textContent =
    room === 0
      ? `# The prompt fills all ${project.config.n_positions} positions: no text can follow it.`
      : program(settings, room ?? settings.length, file);
  $("code-notes").textContent = settings.sampled
    ? "It writes the likeliest words; the library samples by other random numbers than this page."
    : "";
}

/** Put the settings into the fields; what was wrong in those of numbers is gone. */
function showFields() {
  for (const id of Object.keys(wrongNumbers)) sayNumber(id, "");
  for (const name of ["prompt", "toward", "away", "length", "seed"]) $(name).value = settings[name];
  $("random").value = settings.randomSeed;
  $("coeff").value = settings.coeff;
  $("exact").value = settings.coeff;
  for (const radio of document.getElementsByName("layer")) {
    radio.checked = !file && Number(radio.value) === settings.layer;
    radio.disabled = Boolean(file);
  }
  for (const radio of document.getElementsByName("sampled")) {
    radio.checked = (radio.value === "1") === settings.sampled;
  }
  for (const name of ["toward", "away", "swap", "pairs"]) $(name).disabled = Boolean(file);
  $("close").hidden = !file;
  $("layer-notes").textContent = file
    ? `As in the file: after block ${file.layers.join(", ")}.`
    : "The direction is read and added after this block, counted from 0.";
  $("file-notes").classList.toggle("hint", !file); // nobody drops anything on a phone
  $("file-notes").textContent = file
    ? `${file.name} steers. At the coefficient ${Number(file.size.toPrecision(6))}, its norm, it is ` +
      "as it was saved. " +
      file.notes.join(" ")
    : "Or drop a steering vector of the library anywhere here.";
}

// --- what the reader does ---

/** Change settings; the map is cleared by what it depends on. */
function change(changes, { later = false } = {}) {
  const clears = ["prompt", "toward", "away", "seed"].some(
    (name) => name in changes && changes[name] !== settings[name],
  );
  settings = { ...settings, ...changes };
  if (clears) clearMap();
  clearTimeout(timer);
  if (later) timer = setTimeout(run, TYPING);
  else run();
}

/** Take a number from a field; one that is not written to its end yet is no mistake. */
function changeNumber(name, field, isDone = false) {
  const { value, problem } = readNumber(name, field.value, project);
  sayNumber(field.id, isDone || field.value !== "" ? problem : "");
  if (value !== null && value !== settings[name]) change({ [name]: value }, { later: true });
  return value;
}

function suggest(select, label, groups, use) {
  select.append(element("option", { value: "" }, label));
  for (const [name, options] of Object.entries(groups)) {
    const made = options.map(([text, value]) => element("option", { value }, text));
    select.append(...(name ? [element("optgroup", { label: name }, ...made)] : made));
  }
  select.onchange = () => {
    use(select.value);
    select.value = "";
  };
}

async function useFile(chosen) {
  say("file", "");
  if (!chosen) return;
  if (chosen.size > LARGEST_FILE) {
    say("file", `“${chosen.name}” is too large for a steering vector of this model.`);
    return;
  }
  let bytes;
  try {
    bytes = new Uint8Array(await chosen.arrayBuffer());
  } catch {
    say("file", `“${chosen.name}” cannot be read: it is a folder, or no longer there.`);
    return;
  }
  worker.postMessage({ kind: "file", bytes, name: chosen.name });
}

async function copy(text, place, done) {
  try {
    await navigator.clipboard.writeText(text);
    $(place).textContent = done;
    return true;
  } catch {
    return false; // not allowed here
  }
}

function wire() {
  for (const name of ["prompt", "toward", "away"]) {
    $(name).oninput = ({ target }) => change({ [name]: target.value }, { later: true });
  }
  suggest($("prompts"), "Suggestions", { "": project.prompts.map((it) => [it, it]) }, (prompt) => {
    change({ prompt });
    showFields();
  });
  const pairs = { Preset: [["Love", "Hate"]], ...project.pairs };
  const options = Object.entries(pairs).map(([name, list]) => [
    name,
    list.map((pair) => [pair.join(" − "), JSON.stringify(pair)]),
  ]);
  suggest($("pairs"), "Suggestions", Object.fromEntries(options), (text) => {
    const [toward, away] = JSON.parse(text);
    change({ toward, away });
    showFields();
  });
  $("swap").onclick = () => {
    change({ toward: settings.away, away: settings.toward });
    showFields();
  };
  $("layers").append(
    ...Array.from({ length: project.config.n_layer }, (_, layer) => {
      const radio = element("input", { type: "radio", name: "layer", value: layer });
      radio.onchange = () => change({ layer });
      return element("label", {}, radio, " ", element("span", {}, `${layer}`));
    }),
  );
  $("coeff").oninput = ({ target }) => {
    $("exact").value = target.value;
    sayNumber("exact", "");
    change({ coeff: Number(target.value) });
  };
  $("exact").oninput = ({ target }) => {
    const value = changeNumber("coeff", target);
    if (value !== null) $("coeff").value = value;
  };
  $("exact").onchange = ({ target }) => changeNumber("coeff", target, true);
  $("preset").textContent = `preset ${signed(project.preset.coeff)}`;
  $("preset").onclick = () => {
    change(file ? { coeff: project.preset.coeff } : { ...project.preset });
    showFields();
  };
  for (const radio of document.getElementsByName("sampled")) {
    radio.onchange = () => change({ sampled: radio.value === "1" });
  }
  const numbers = { length: "length", seed: "seed", random: "randomSeed" };
  for (const [id, name] of Object.entries(numbers)) {
    $(id).oninput = ({ target }) => changeNumber(name, target);
    $(id).onchange = ({ target }) => changeNumber(name, target, true);
  }
  $("save").onclick = () => worker.postMessage({ kind: "save", settings });
  $("open").onclick = () => $("file").click();
  $("file").onchange = ({ target }) => {
    useFile(target.files[0]);
    target.value = "";
  };
  $("close").onclick = () => {
    worker.postMessage({ kind: "file", bytes: null });
    $("open").focus();
  };
  $("more").onclick = () => {
    state("counting");
    countTone();
  };
  $("samples").parentElement.ontoggle = showAllSamples;
  $("fill").onclick = () => {
    clearMap();
    fillMap();
    $("fill").textContent = "Filling …";
  };
  $("map").onkeydown = (event) => moveInMap($("map"), event);
  $("map").onclick = ({ target }) => {
    const { layer, coeff } = target.dataset;
    if (coeff === undefined) return;
    change({ coeff: Number(coeff), ...(layer && { layer: Number(layer) }) });
    showFields();
  };
  $("copy").onclick = async () => {
    if (await copy($("code").textContent, "code-notes", "Copied.")) return;
    getSelection().selectAllChildren($("code"));
    $("code-notes").textContent = "It is selected: copy it.";
  };
  $("link").onclick = async () => {
    const address = `${location.href.split("#")[0]}#${writeLink(settings)}`;
    if (await copy(address, "link-notes", "The link is copied.")) return;
    $("address").hidden = false;
    $("address").value = address;
    $("address").select();
    $("link-notes").textContent = "This is the link: copy it.";
  };
  $("reset").onclick = () => {
    worker.postMessage({ kind: "file", bytes: null });
    change(defaults(project));
    showFields();
  };
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return; // a text may be dragged into a field
      event.preventDefault();
      document.body.classList.toggle("dropping", name === "dragover");
      if (name === "drop") useFile(event.dataTransfer.files[0]);
    });
  }
  document.querySelector(".skip").onclick = (event) => {
    event.preventDefault(); // the address holds the settings
    $("results").focus();
  };
  addEventListener("hashchange", () => follow(readLink(location.hash.slice(1), project)));
}

/** Use the settings of a link. */
function follow({ settings: given, problems }) {
  change(given);
  showFields();
  $("problem").textContent = problems.join(" ");
}

wire();
$("further").open = !matchMedia("(max-width: 720px)").matches; // there the texts come first
showFields();
completions = Object.fromEntries(CONDITIONS.map((name) => [name, []]));
showSettings();
showAllTone();
$("about").textContent =
  `The model has ${project.config.n_layer} blocks of width ${project.config.n_embd}, knows ` +
  `${project.taught.length.toLocaleString("en")} words, and was trained on the sentences of a ` +
  `grammar. Whatever it does is true of these sentences only.`;
const worker = startWorker();
if (start.problems.length) {
  const once = shown.ready;
  shown.ready = () => {
    once();
    $("problem").textContent = start.problems.join(" ");
  };
}
