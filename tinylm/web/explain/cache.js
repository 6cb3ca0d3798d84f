// The parts `cache` and `int8`: what serving stores, and in how many bytes.

import { bar, byId, fill, fixed, make, quoted, say, whole } from "./dom.js";
import { showChooser } from "./chooser.js";
import { part } from "./part.js";
import { ask } from "./service.js";
import { on, set, state } from "./state.js";

const NAMES = { qkv: "queries, keys and values", out: "output of attention", up: "into the MLP", down: "out of the MLP" };
const N_NUMBERS = 8;
const MEGABYTE = 1e6;

// --- the cache

part("cache", [], () => ask("cache"), (use, get) => {
  const slider = byId("length");
  slider.max = use.slot_positions;
  slider.value = use.used_positions;
  slider.use = use;
  showCache(get, use);
});

byId("length").addEventListener("input", ({ target }) => {
  if (target.use) showCache((name) => byId("cache").querySelector(`[data-is="${name}"]`), target.use);
});

/** The tokens of the slider, and their bytes. */
export function cacheNow() {
  const { value, use } = byId("length");
  return use && { n_tokens: Number(value), bytes: (Number(value) * use.slot_bytes) / use.slot_positions };
}

function showCache(get, use) {
  const { n_tokens: n, bytes } = cacheNow();
  byId("length-output").value = `${n} of ${use.slot_positions}`;
  const of_token = use.slot_bytes / use.slot_positions;
  say(get("about"), `${n} tokens take ${size(bytes)}: ${whole(of_token)} bytes for each. The replica has ${use.slots} slots of ${size(use.slot_bytes)}.`);
  const cells = get("picture");
  if (cells.childElementCount !== use.slot_positions) {
    cells.replaceChildren(...Array.from({ length: use.slot_positions }, () => make("i")));
  }
  for (const [i, cell] of [...cells.children].entries()) cell.className = i < n - 1 ? "kept" : i === n - 1 ? "new" : "";
  fill(get("table"), ["", "Tokens computed", "Keys and values read"], [
    ["With the cache", "1", whole(n)],
    ["Without", whole(n), whole((n * (n + 1)) / 2)],
  ]);
}

const size = (bytes) => (bytes >= MEGABYTE ? `${(bytes / MEGABYTE).toFixed(2)} MB` : `${whole(bytes / 1000)} kB`);

// --- 8 bits

export const ROUNDED = Object.keys(NAMES);
export const rounded = (name, later = false) => ask("matmul", { layer: state.layer, name, position: state.position }, later);

part("int8", ["position", "layer", "matmul"], async () => {
  const found = {};
  for (const name of ROUNDED) found[name] = await rounded(name);
  return found;
}, (found, get) => {
  showChooser(get("choose"));
  showNames(get("names"));
  say(get("layer"), String(state.layer));
  const { values: [row], scales: [scale], input, input_error: [error], output_error: [of_output] } = found[state.matmul];
  say(get("about"), `For ${quoted(state.tokens[state.position])}, ${row.length} numbers take ${whole(row.length + 4)} bytes instead of ${whole(4 * row.length)}. Rounding changes them by ${exact(error)} of their length, and the product by ${exact(of_output)}.`);
  fill(get("table"), ["", "float32", "8 bits", "times the scale"], row.slice(0, N_NUMBERS).map((value, i) =>
    [String(i + 1), fixed(input[i], 4), fixed(value, 0), fixed(value * scale, 4)]));
  const errors = Object.entries(found).map(([name, one]) => [name, one.input_error[0]]);
  const most = Math.max(...errors.map(([, one]) => one));
  fill(get("errors"), ["Input", "", "Error"], errors.map(([name, one]) => ({
    cells: [NAMES[name], bar(one / most), exact(one)],
    class: name === state.matmul ? "chosen" : null,
  })));
});

const exact = (share) => `${(100 * share).toFixed(2)} %`;

function showNames(place) {
  if (!place.childElementCount) {
    for (const [value, text] of Object.entries(NAMES)) {
      const input = make("input", { type: "radio", name: "matmul", value, autocomplete: "off" });
      input.addEventListener("change", () => set({ matmul: value }));
      place.append(make("label", {}, input, text));
    }
  }
  for (const input of place.querySelectorAll("input")) input.checked = input.value === state.matmul;
}

on(["text"], () => (byId("length").use = undefined));
