// How things are shown: each function fills an element.

import { CONDITIONS } from "./settings.js";

/** Make an element with attributes and children; `style` sets properties such as `--share`. */
export function element(tag, { style = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(style)) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

/** A number with a sign, and with a real minus. */
export function signed(value, digits) {
  const text = digits === undefined ? `${Math.abs(value)}` : Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : "+") + text;
}

/** A token as it is seen: with its spaces. */
export function seen(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→");
}

/** A text whose words with a tone, and whose words never taught, are marked. */
export function marked(text, words) {
  const toned = words.toned(text).map((it) => ({ ...it, kind: it.value > 0 ? "up" : "down" }));
  const spots = [...toned, ...words.untaught(text).map((it) => ({ ...it, kind: "untaught" }))];
  spots.sort((one, other) => one.start - other.start);
  const parts = [];
  let at = 0;
  for (const { start, end, kind } of spots) {
    if (start < at) continue;
    parts.push(text.slice(at, start));
    const word = text.slice(start, end);
    parts.push(
      kind === "untaught"
        ? element("span", { class: "untaught", title: "The grammar never taught this word" }, word)
        : element("span", { class: `toned ${kind}` }, word),
    );
    at = end;
  }
  return [...parts, text.slice(at)];
}

/** How many words of a text count: "2 positive words, 1 negative". */
export function counts(text, words) {
  const values = words.toned(text).map(({ value }) => value);
  const up = values.filter((value) => value > 0).length;
  const down = values.length - up;
  if (!values.length) return "no word with a tone";
  return `${up} positive ${up === 1 ? "word" : "words"}, ${down} negative`;
}

/** The tokens of a text; those that are part of a word never taught are marked. */
export function showTokens(list, tokens, words) {
  const untaught = words.untaught(tokens.join(""));
  let end = 0;
  const shown = tokens.map((token) => {
    const start = end;
    end += token.length;
    const strange = untaught.some((word) => word.start < end && word.end > start);
    return element("span", { role: "listitem", class: strange && "strange" }, seen(token));
  });
  list.replaceChildren(...shown);
}

/** The table of the next token: a bar and a number for each condition. */
export function showNext(table, tokens) {
  const largest = Math.max(...tokens.flatMap(({ probabilities }) => probabilities));
  const percent = (share) => (share < 0.0005 ? "0" : (100 * share).toFixed(share < 0.0995 ? 1 : 0));
  table.tBodies[0].replaceChildren(
    ...tokens.map(({ token, probabilities }) =>
      element(
        "tr",
        {},
        element("th", { scope: "row", class: "token" }, seen(token)),
        ...probabilities.map((share, column) =>
          element(
            "td",
            { class: CONDITIONS[column], style: { "--share": share / largest } },
            element("span", { class: "number" }, `${percent(share)} %`),
          ),
        ),
      ),
    ),
  );
}

/**
 * The bars of tone.
 *
 * @param {Object<string, number[]>} tally by condition how many are positive, neither and negative
 */
export function showTone(place, tally, names) {
  const kinds = ["positive", "neither", "negative"];
  place.replaceChildren(
    ...CONDITIONS.map((condition) => {
      const total = tally[condition].reduce((sum, count) => sum + count, 0);
      const said = kinds.map((kind, index) => `${tally[condition][index]} ${kind}`).join(", ");
      return element(
        "div",
        { class: "tone" },
        element("div", { class: "name" }, names[condition]),
        element(
          "div",
          { class: "stack", role: "img", "aria-label": `${names[condition]}: ${said}` },
          ...kinds.map((kind, index) => {
            const count = tally[condition][index];
            return element(
              "span",
              { class: kind, style: { "flex-grow": total ? count : +(kind === "neither") } },
              count ? `${count}` : "",
            );
          }),
        ),
      );
    }),
  );
}

export function showSamples(place, completions, names, words) {
  place.replaceChildren(
    ...CONDITIONS.map((condition) =>
      element(
        "section",
        {},
        element("h3", {}, names[condition]),
        element(
          "ol",
          {},
          ...completions[condition].map((text) => element("li", {}, ...marked(text, words))),
        ),
      ),
    ),
  );
}

/**
 * The map as a table of buttons; arrow keys move between them.
 *
 * @param {{layers: (?number)[], coeffs: number[], cells: Map<string, Object>}} map a layer is null
 *   where a file says which
 */
export function showMap(table, { layers, coeffs, cells }, { layer: chosenLayer, coeff: chosen }) {
  const isChosen = (layer, coeff) => (layer === null || layer === chosenLayer) && coeff === chosen;
  const hasChosen = layers.some((layer) => coeffs.some((coeff) => isChosen(layer, coeff)));
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "layer"),
    ...coeffs.map((coeff) => element("th", { scope: "col" }, signed(coeff))),
  );
  const rows = [...layers].reverse().map((layer, line) => {
    const where = layer === null ? "as in the file" : `layer ${layer}`;
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, layer === null ? "file" : `${layer}`),
      ...coeffs.map((coeff, column) => {
        const cell = cells.get(`${layer} ${coeff}`);
        const share = cell && signed(cell.share, 2);
        const found = cell ? `${share}, of ${cell.count} texts` : "not sampled yet";
        const here = isChosen(layer, coeff);
        const first = !hasChosen && line === 0 && column === 0;
        const button = element(
          "button",
          {
            type: "button",
            "data-layer": layer ?? "",
            "data-coeff": coeff,
            tabindex: here || first ? 0 : -1,
            "aria-pressed": `${here}`,
            title: cell && found,
            "aria-label": `${where}, coefficient ${signed(coeff)}: ${found}`,
            class: cell && "filled",
            style: cell && {
              "--share": Math.abs(cell.share),
              "--tone": `var(--${cell.share < 0 ? "hate" : "love"})`,
            },
          },
          cell ? share : "·",
        );
        return element("td", {}, button);
      }),
    );
  });
  // What is watched keeps its focus.
  const { activeElement } = document;
  const focused = table.contains(activeElement) && activeElement.dataset;
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  if (focused) {
    const same = `[data-layer="${focused.layer}"][data-coeff="${focused.coeff}"]`;
    table.querySelector(same)?.focus();
  }
}

/** Move the focus inside the map by an arrow key, Home or End. */
export function moveInMap(table, event) {
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("button")]);
  const line = rows.findIndex((row) => row.includes(event.target));
  if (line < 0) return;
  const column = rows[line].indexOf(event.target);
  const last = rows[line].length - 1;
  const places = {
    ArrowLeft: [line, column - 1],
    ArrowRight: [line, column + 1],
    ArrowUp: [line - 1, column],
    ArrowDown: [line + 1, column],
    Home: [line, 0],
    End: [line, last],
  };
  const target = places[event.key] && rows[places[event.key][0]]?.[places[event.key][1]];
  if (!places[event.key]) return;
  event.preventDefault();
  if (!target) return;
  event.target.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

/** Both prompts of the pair, token by token, and how much they differ after each block. */
export function showDifferences(table, { tokens, shares }, pair, chosen) {
  const count = Math.max(...tokens.map((row) => row.length));
  const largest = Math.max(...shares.flat(), 1e-9);
  const columns = Array.from({ length: count }, (_, column) => column);
  const heads = tokens.map((row, side) =>
    element(
      "tr",
      { class: side ? "away" : "toward" },
      element("th", { scope: "row" }, side ? "away from" : "toward"),
      ...columns.map((column) => {
        const read = column === row.length - 1;
        const text = column < row.length ? seen(row[column]) : "";
        return element("td", { class: read ? "token read" : "token" }, text);
      }),
    ),
  );
  const rows = shares
    .map((row, layer) =>
      element(
        "tr",
        { class: layer === chosen && "chosen" },
        element("th", { scope: "row" }, `layer ${layer}`),
        ...columns.map((column) => {
          if (column >= row.length) return element("td", {}, "");
          const style = { "--share": row[column] / largest };
          return element("td", { class: "heat", style }, row[column].toFixed(2));
        }),
      ),
    )
    .reverse();
  table.replaceChildren(element("thead", {}, ...heads), element("tbody", {}, ...rows));
}

/** A text as Python writes it. */
function quoted(text) {
  return JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029]/g, (sign) => {
    return `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`;
  });
}

/** A program that writes the steered text with the library. */
export function program(settings, room, file) {
  const { prompt, toward, away, layer, coeff } = settings;
  const train = file
    ? [
        `vector = SteeringVector.load(${quoted(file.name)})`,
        `multiplier = ${coeff} / ${file.size}  # the norm of what is saved`,
      ]
    : [
        `pairs = [(${quoted(toward)}, ${quoted(away)})]`,
        `vector = train_steering_vector(model, tokenizer, pairs, layers=[${layer}]).unit()`,
        `multiplier = ${coeff}`,
      ];
  return [
    `from common import load_model, ${file ? "SteeringVector" : "train_steering_vector"}`,
    "",
    'model, tokenizer, preset = load_model("embedded")',
    ...train,
    `inputs = tokenizer(${quoted(prompt)}, return_tensors="pt")`,
    "with vector.apply(model, multiplier=multiplier):",
    `    ids = model.generate(**inputs, max_new_tokens=${room}, do_sample=False)`,
    "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
  ].join("\n");
}
