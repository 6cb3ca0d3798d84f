// The parts `tokens` and `embedding`: pieces of text, and the vectors that stand for them.

import { showChooser } from "./chooser.js";
import { bar, capital, fill, fixed, quoted, say, word } from "./dom.js";
import { picture } from "./heat.js";
import { part } from "./part.js";
import { ask } from "./service.js";
import { state } from "./state.js";

const LARGEST = 127; // of an 8-bit number

part("tokens", ["position"], () => null, (_, get) => {
  showChooser(get("choose"));
  const token = state.tokens[state.position];
  const n_bytes = token.bytes.length;
  const size = n_bytes ? `has ${n_bytes} ${n_bytes === 1 ? "byte" : "bytes"}` : "has no text: it begins and ends every story";
  say(get("about"), `${capital(quoted(token))} is number ${token.id}. It ${size}.`);
  fill(get("table"), ["Token", "Number", "Bytes"], state.tokens.map((one, position) => ({
    cells: [word(one), one.id, one.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ") || "none"],
    class: position === state.position ? "chosen" : null,
  })));
});

/** Return the 8-bit rows of the embedding, as the first layer reads them. */
export const embedding = (later = false) => ask("matmul", { layer: 1, name: "qkv" }, later);

part("embedding", ["position"], embedding, ({ values }, get) => {
  showChooser(get("choose"));
  const { position, tokens } = state;
  const n_numbers = values[0].length;
  const label = `${tokens.length} rows of ${n_numbers} numbers, one row for each token`;
  const canvas = picture(label, tokens.length, n_numbers, (row, column) => values[row][column] / LARGEST);
  canvas.style.height = `${Math.min(20, 0.8 * tokens.length)}rem`;
  get("picture").replaceChildren(canvas);
  const near = similar(values, position);
  const [first] = near;
  const nearest = first ? ` The most similar token here is ${quoted(tokens[first.position])}.` : "";
  say(get("about"), `${capital(quoted(tokens[position]))} became ${n_numbers} numbers.${nearest}`);
  fill(get("similar"), ["Token", "", "Similarity"], near.slice(0, 6).map((one) =>
    [word(tokens[one.position]), bar(one.cosine), fixed(one.cosine, 2)]));
});

/** Return the other tokens of the sentence, the most similar first: { position, cosine }. The same token counts once. */
export function similar(values, position) {
  const ids = new Set([state.tokens[position].id]);
  return values
    .map((row, at) => ({ position: at, cosine: cosine(values[position], row) }))
    .sort((a, b) => b.cosine - a.cosine)
    .filter(({ position: at }) => !ids.has(state.tokens[at].id) && ids.add(state.tokens[at].id));
}

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}
