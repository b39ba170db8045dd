// A ranking as levels, best first: [[2], [0, 1]] is answer 2 before 0 and 1, which are equal. Pure: each function gives a
// new ranking.

const without = (levels, answer) => levels.map((level) => level.filter((other) => other !== answer)).filter((level) => level.length);

/** The number of an answer's level, from 0. */
export const levelOf = (levels, answer) => levels.findIndex((level) => level.includes(answer));

/** Before all answers of the level with this number, counted without the answer itself. */
export const place = (levels, answer, number) => without(levels, answer).toSpliced(number, 0, [answer]);

export const best = (levels, answer) => place(levels, answer, 0);
export const worst = (levels, answer) => place(levels, answer, levels.length);

/** One step: out of a tie, or into one with the next answer above (-1) or below (1). */
export function step(levels, answer, direction) {
  const number = levelOf(levels, answer);
  const rest = without(levels, answer);
  if (levels[number].length > 1) return rest.toSpliced(direction < 0 ? number : number + 1, 0, [answer]);
  const next = levels[number + direction];
  return next ? tie(levels, answer, next[0]) : levels;
}

/** Equal to another answer. */
export function tie(levels, answer, other) {
  if (answer === other) return levels;
  return without(levels, answer).map((level) => (level.includes(other) ? [...level, answer] : level));
}

/** Equal to the answer above. */
export function tieAbove(levels, answer) {
  const order = levels.flat();
  const above = order[order.indexOf(answer) - 1];
  return above === undefined ? levels : tie(levels, answer, above);
}
