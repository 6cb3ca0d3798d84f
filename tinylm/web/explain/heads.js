// What a head reads from: averages over the rows of its picture. Pure functions.
// A picture is a list of rows of numbers from 0 to 255; row i says how much token i reads from each token.

const LARGEST = 255;
const OF_KIND = {
  before: (ids, i) => [i - 1],
  boundary: () => [0],
  self: (ids, i) => [i],
  after: (ids, i) => ids.slice(0, i).flatMap((id, j) => (id === ids[i] && j + 1 < i ? [j + 1] : [])),
};

/** Return the share that the tokens after the first read from their tokens of a kind, on average; 0 if there are none. */
export function shareOf(kind, rows, ids) {
  let [sum, n] = [0, 0];
  for (let i = 1; i < rows.length; i++) {
    const read = OF_KIND[kind](ids, i);
    if (!read.length) continue;
    sum += read.reduce((total, j) => total + rows[i][j], 0) / LARGEST;
    n += 1;
  }
  return n ? sum / n : 0;
}

/** Return all heads as { layer, head, share }, numbered from 1, the largest share of a kind first. */
export function rankedBy(kind, layers, ids) {
  const heads = layers.flatMap((of_layer, layer) =>
    of_layer.map((rows, head) => ({ layer: layer + 1, head: head + 1, share: shareOf(kind, rows, ids) })));
  return heads.sort((a, b) => b.share - a.share);
}

/** Return what a token reads from, the largest share first: { position, share }. */
export function reads(rows, position) {
  return rows[position].slice(0, position + 1)
    .map((value, at) => ({ position: at, share: value / LARGEST }))
    .sort((a, b) => b.share - a.share);
}
