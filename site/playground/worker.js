// The worker: holds the model, and takes turns between what the page asks for.

import { Playground } from "./steering.js";
import { Refusal } from "./vectors.js";

let playground = null;
// By kind, the first before the others: what is shown at the top goes first.
const tasks = { texts: null, tone: null, map: null };
let working = false;

/** Between two steps messages of the page are read; a timer would wait for 4 ms each time. */
const channel = new MessageChannel();
const pause = () =>
  new Promise((resolve) => {
    channel.port2.onmessage = resolve;
    channel.port1.postMessage(null);
  });

/** The bytes of a text in base64. */
function decoded(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text); // several times as fast
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

function tell(event, request) {
  postMessage({ ...event, request });
}

function refuse(error, request) {
  if (!(error instanceof Refusal)) {
    setTimeout(() => { throw error; }); // so that the page hears of it, also between two steps
    return;
  }
  tell({ kind: "refused", field: error.field, message: error.message }, request);
}

async function work() {
  if (working) return;
  working = true;
  for (;;) {
    const kind = Object.keys(tasks).find((name) => tasks[name]);
    if (!kind) break;
    const task = tasks[kind];
    try {
      const { value, done } = task.steps.next();
      if (value) tell(value, task.request);
      if (done && tasks[kind] === task) {
        tasks[kind] = null;
        tell({ kind: "finished", task: kind }, task.request);
      }
    } catch (error) {
      tasks[kind] = null;
      refuse(error, task.request);
    }
    await pause();
  }
  working = false;
}

const answers = {
  load({ weights, tokenizer, project }) {
    playground = new Playground(decoded(weights), tokenizer, project);
    tell({ kind: "ready" });
  },
  texts({ settings, request }) {
    tasks.tone = null;
    tasks.texts = { request, steps: playground.texts(settings) };
  },
  differences({ settings, request }) {
    tell(playground.differences(settings), request);
  },
  tone({ settings, from, count, request }) {
    tasks.tone = { request, steps: playground.tone(settings, from, count) };
  },
  map({ settings, request }) {
    tasks.map = settings && { request, steps: playground.map(settings) };
  },
  file({ bytes, name, request }) {
    const file = playground.useFile(bytes, name);
    const { size, notes, layers } = file ?? {};
    tell({ kind: "file", name, size, notes, layers: layers && [...layers.keys()] }, request);
  },
  save({ settings, request }) {
    tell({ kind: "saved", ...playground.save(settings) }, request);
  },
};

onmessage = ({ data }) => {
  try {
    answers[data.kind](data);
  } catch (error) {
    refuse(error, data.request);
  }
  work();
};
