// How settings choose a token: `sample` of tinylm/kernels/numpy.py in the browser. Pure functions.

const LEAST_TEMPERATURE = 1e-30; // a lower temperature gives the same tokens

/** Divide the positive scores of seen tokens by the penalty, and multiply the negative ones. */
export function penalize(scores, seen, penalty) {
  const factor = Math.fround(penalty);
  return scores.map((score, id) => (seen.has(id) ? (score > 0 ? score / factor : score * factor) : score));
}

/** Return e^(score / temperature), divided by the largest of these, as Float64Array. */
export function soften(scores, temperature) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const cold = Math.max(temperature, LEAST_TEMPERATURE);
  return Float64Array.from(scores, (score) => Math.exp((score - most) / cold));
}

/** Return ids, the largest weight first, and of equal weights the lowest id first. */
export function ranked(weights) {
  return Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a] || a - b);
}

/** Return the weights with zeros for the tokens that top_k, top_p and min_p remove. The largest weight is 1. */
export function keep(weights, { top_k = 0, top_p = 1, min_p = 0 }) {
  const order = ranked(weights);
  let n_kept = top_k > 0 ? Math.min(top_k, order.length) : order.length;
  if (top_p < 1) {
    let total = 0;
    for (let i = 0; i < n_kept; i++) total += weights[order[i]];
    let sum = 0;
    for (let i = 0; i < n_kept; i++) {
      sum += weights[order[i]];
      if (sum >= top_p * total) n_kept = i + 1;
    }
  }
  const kept = new Float64Array(weights.length);
  for (const id of order.slice(0, n_kept)) if (weights[id] >= min_p) kept[id] = weights[id];
  return kept;
}

/** Return the first token at which the sum of the weights exceeds `uniform` times their total. */
export function draw(weights, uniform) {
  const total = weights.reduce((a, b) => a + b, 0);
  let [sum, last] = [0, 0];
  for (const [id, weight] of weights.entries()) {
    sum += weight;
    if (weight > 0) last = id;
    if (sum > uniform * total) return id;
  }
  return last;
}

const shares = (weights) => {
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / total);
};

/** Return the stages { name, probabilities, n_kept }, from the model's own to the last, and the picked token. */
export function choose(scores, seen, settings, uniform) {
  const penalized = penalize(scores, seen, settings.repetition_penalty);
  const greedy = penalized.reduce((best, score, id) => (score > penalized[best] ? id : best), 0);
  const warm = settings.temperature === 0
    ? new Float64Array(scores.length).fill(1, greedy, greedy + 1)
    : soften(penalized, settings.temperature);
  const by_top_k = keep(warm, { top_k: settings.top_k });
  const by_top_p = keep(by_top_k, { top_p: settings.top_p });
  const by_min_p = keep(by_top_p, { min_p: settings.min_p });
  const stages = Object.entries({
    model: soften(scores, 1),
    repetition_penalty: soften(penalized, 1),
    temperature: warm,
    top_k: by_top_k,
    top_p: by_top_p,
    min_p: by_min_p,
  }).map(([name, weights]) => ({
    name,
    probabilities: shares(weights),
    n_kept: weights.reduce((n, weight) => n + (weight > 0), 0),
  }));
  return { stages, picked: draw(by_min_p, uniform), greedy };
}
