// The tokenizer of GPT-2: byte-level BPE, read from tokenizer.json.

// `\s` is another set in every language; White_Space is what the tokenizer's own library means.
const PIECES = new RegExp(
  [
    "'s|'t|'re|'ve|'m|'ll|'d",
    " ?\\p{L}+",
    " ?\\p{N}+",
    " ?[^\\p{White_Space}\\p{L}\\p{N}]+",
    "\\p{White_Space}+(?!\\P{White_Space})",
    "\\p{White_Space}+",
  ].join("|"),
  "gu",
);

/** The letter that stands for each byte: itself where it is seen, else one from U+0100 on. */
function byteLetters() {
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : next++));
}

export class Tokenizer {
  /** @param {Object} file what tokenizer.json holds */
  constructor(file) {
    this.ids = new Map(Object.entries(file.model.vocab));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.special = new Map(file.added_tokens.map(({ content, id }) => [content, id]));
    this.letters = byteLetters();
    const bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
    this.bytes = [];
    for (const [token, id] of this.ids) {
      this.bytes[id] = this.special.has(token)
        ? new TextEncoder().encode(token)
        : Uint8Array.from(token, (letter) => bytes.get(letter));
    }
    this.known = new Map(); // pieces that were split already
  }

  /**
   * @param {string} text
   * @returns {number[]} token ids
   */
  encode(text) {
    const ids = [];
    const marks = [...this.special.keys()].map((mark) => mark.replace(/\W/g, "\\$&")).join("|");
    for (const part of text.split(new RegExp(`(${marks})`))) {
      if (this.special.has(part)) {
        ids.push(this.special.get(part));
        continue;
      }
      for (const [piece] of part.matchAll(PIECES)) ids.push(...this.split(piece));
    }
    return ids;
  }

  /** The ids of one piece: pairs are merged, the one that was learnt first before the others. */
  split(piece) {
    let found = this.known.get(piece);
    if (found) return found;
    let parts = Array.from(new TextEncoder().encode(piece), (byte) => this.letters[byte]);
    for (;;) {
      const ranks = parts.slice(1).map((part, at) => this.ranks.get(`${parts[at]} ${part}`));
      const best = ranks.reduce((least, rank) => (rank < least ? rank : least), Infinity);
      if (best === Infinity) break;
      const merged = [];
      for (let at = 0; at < parts.length; at++) {
        if (ranks[at] === best) merged.push(parts[at] + parts[++at]);
        else merged.push(parts[at]);
      }
      parts = merged;
    }
    found = parts.map((part) => this.ids.get(part));
    this.known.set(piece, found);
    return found;
  }

  /**
   * @param {number[]} ids
   * @returns {string} what is no UTF-8, such as half of a letter, becomes U+FFFD
   */
  decode(ids) {
    const bytes = ids.flatMap((id) => [...this.bytes[id]]);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }
}
