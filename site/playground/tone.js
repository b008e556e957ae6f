// What is counted and marked in texts: words with a tone, and words that the model never saw.

export class Words {
  /** @param {Object} project what the library knows: lexicon, negations, taught */
  constructor({ lexicon, negations, taught }) {
    this.lexicon = new Map(Object.entries(lexicon));
    this.negations = new Set(negations);
    this.taught = new Set(taught);
  }

  /**
   * The words with a tone, as the library's `tone_words` finds them: a negation up to two words
   * before, in the same sentence, reverses one.
   *
   * @returns {{start: number, end: number, value: number}[]} +1 or -1 each
   */
  toned(text) {
    const found = [];
    for (const sentence of text.matchAll(/[^.!?]+/g)) {
      const words = [...sentence[0].matchAll(/[A-Za-z]+/g)];
      const small = words.map(([word]) => word.toLowerCase());
      words.forEach((word, index) => {
        const value = this.lexicon.get(small[index]);
        if (!value) return;
        const start = sentence.index + word.index;
        const before = small.slice(Math.max(0, index - 2), index);
        const turned = before.some((earlier) => this.negations.has(earlier));
        found.push({ start, end: start + word[0].length, value: turned ? -value : value });
      });
    }
    return found;
  }

  /** Positive minus negative words. */
  tone(text) {
    return this.toned(text).reduce((sum, { value }) => sum + value, 0);
  }

  /** @returns {{start: number, end: number, word: string}[]} words that the grammar never taught */
  untaught(text) {
    return [...text.matchAll(/[\p{L}\p{M}]+/gu)]
      .filter(([word]) => !this.taught.has(word.toLowerCase()))
      .map(({ 0: word, index }) => ({ start: index, end: index + word.length, word }));
  }
}
