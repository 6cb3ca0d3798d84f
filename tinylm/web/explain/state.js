// What the reader has chosen, and the answers about the sentence that several parts show.

const listeners = [];

export const state = {
  text: "", // the sentence
  tokens: [], // of the sentence, with the boundary
  position: 0, // of the chosen token
  layer: 3, // of the chosen head
  head: 6,
  matmul: "qkv", // the matrix product whose input `int8` shows
  settings: {}, // of the sampler, by name
  uniform: 0.5, // the random number that picks the token
  logits: null, // Float32Array of all scores, or null until the service has answered
  names: new Map(), // token id -> token, of the tokens that can be shown
  choice: null, // what `choose` of sampler.js returns for these settings, and the picked token
};

/** Change fields. Call each listener once if one of its fields has another value. */
export function set(changes) {
  const changed = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  Object.assign(state, changes);
  for (const { names, react } of listeners) if (changed.some((name) => names.includes(name))) react();
}

/** Call `react` after a change of one of these fields. */
export function on(names, react) {
  listeners.push({ names, react });
}
