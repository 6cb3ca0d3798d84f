// The part `layer`: all heads as small pictures, one as a large picture, the MLP's neurons, and the vector's length.

import { element } from "../charts.js";
import { showChooser } from "./chooser.js";
import { bar, byId, capital, fill, make, percent, quoted, say, whole, word } from "./dom.js";
import { picture } from "./heat.js";
import { rankedBy, reads, shareOf } from "./heads.js";
import { part } from "./part.js";
import { ask } from "./service.js";
import { on, set, state } from "./state.js";

const KINDS = { before: "the token before", boundary: "the boundary", self: "the token itself", after: "what followed the same token earlier" };
const CLEAR = 0.35; // share from which a head's label says what it reads from
const N_MARKED = 5;
const NEURONS_IN_A_ROW = 48;
const ids = () => state.tokens.map((token) => token.id);

export const attention = (later = false) => ask("attention", {}, later); // all layers
/** The input of the MLP's last matrix product, which is what its neurons say. */
export const neurons = (later = false) => ask("matmul", { layer: state.layer, name: "down", position: state.position }, later);
export const norms = (later = false) => ask("norms", {}, later);

part("layer", ["position", "layer", "head"], async () => {
  const { weights } = await attention();
  return [weights, await norms(), await neurons()];
}, ([weights, lengths, of_mlp], get) => {
  const rows = weights[state.layer - 1][state.head - 1];
  showHeads(get, weights);
  showHead(get, rows);
  showReads(get, rows);
  showNeurons(get, of_mlp);
  showLengths(get, lengths.norms);
  byId("layer-number").max = weights.length;
  byId("layer-number").value = state.layer;
  byId("layer-output").value = `${state.layer} of ${weights.length}`;
});

// --- all heads

function showHeads(get, weights) {
  const place = get("heads");
  if (place.of !== weights) {
    place.of = weights; // what the pictures show
    get("n-heads").textContent = weights.length * weights[0].length;
    place.replaceChildren(...weights.map((heads, layer) => make("div", { class: "of-layer" },
      make("span", { class: "number", "aria-hidden": true }, layer + 1),
      ...heads.map((rows, head) => headButton(rows, layer + 1, head + 1)))));
  }
  for (const input of place.querySelectorAll("input")) input.checked = input.value === `${state.layer}.${state.head}`;
  showMarked(get, weights);
}

function headButton(rows, layer, head) {
  const [kind, share] = Object.keys(KINDS).map((kind) => [kind, shareOf(kind, rows, ids())]).sort((a, b) => b[1] - a[1])[0];
  const reading = share >= CLEAR ? `, ${percent(share)} from ${KINDS[kind]}` : "";
  const input = make("input", { type: "radio", name: "one-head", value: `${layer}.${head}`, autocomplete: "off",
    "aria-label": `Layer ${layer}, head ${head}${reading}` });
  input.addEventListener("change", () => set({ layer, head }));
  return make("label", { title: `Layer ${layer}, head ${head}` }, input, picture("", rows.length, rows.length, (i, j) => rows[i][j] / 255));
}

/** Up and down go to the next row of pictures; the browser itself handles left and right. */
byId("layer").querySelector(".all-heads").addEventListener("keydown", (event) => {
  const up_or_down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!up_or_down) return;
  event.preventDefault();
  const inputs = [...event.currentTarget.querySelectorAll("input")];
  const in_a_row = inputs.filter((input) => input.offsetParent && top(input) === top(inputs[0])).length;
  const target = inputs[inputs.indexOf(event.target) + up_or_down * in_a_row];
  if (!target) return;
  target.focus();
  target.click();
});

const top = (input) => Math.round(input.parentElement.getBoundingClientRect().top);

function showMarked(get, weights) {
  const kind = byId("mark").value;
  const best = kind ? rankedBy(kind, weights, ids()).slice(0, N_MARKED).filter(({ share }) => share > 0) : [];
  for (const input of get("heads").querySelectorAll("input")) {
    input.parentElement.classList.toggle("marked", best.some(({ layer, head }) => input.value === `${layer}.${head}`));
  }
  const list = best.map(({ layer, head, share }) => `layer ${layer} head ${head}: ${percent(share)}`).join(", ");
  say(get("marked"), !kind ? "" : best.length ? `On average, ${list}.` : "This sentence has nothing of this kind.");
}

byId("mark").addEventListener("change", () => {
  const get = (name) => byId("layer").querySelector(`[data-is="${name}"]`);
  if (get("heads").of) showMarked(get, get("heads").of);
});

// --- one head

function showHead(get, rows) {
  say(get("head-title"), `Layer ${state.layer}, head ${state.head}`);
  const n = rows.length;
  const canvas = picture(`Attention of this head: ${n} rows of ${n} shares. The text below and the table say what a token reads.`,
    n, n, (i, j) => rows[i][j] / 255);
  const names = state.tokens.map((token, i) => make("li", { class: i === state.position ? "chosen" : null }, word(token)));
  const left = make("ol", { class: "side", "aria-hidden": true }, ...names);
  const above = make("ol", { class: "above", "aria-hidden": true }, ...names.map((name) => name.cloneNode(true)));
  const row = make("i", { class: "row", "aria-hidden": true });
  const frame = make("div", { class: n > 20 ? "map many" : "map" }, above, left, canvas, row);
  row.style.setProperty("--at", state.position / n);
  row.style.setProperty("--tall", 1 / n);
  get("head").replaceChildren(frame);
  const [kind, share] = Object.keys(KINDS).map((kind) => [kind, shareOf(kind, rows, ids())]).sort((a, b) => b[1] - a[1])[0];
  const [most] = reads(rows, state.position);
  const [reader, read] = [state.position, most.position].map((position) => quoted(state.tokens[position]));
  say(get("head-about"), `On average, this head reads ${percent(share)} from ${KINDS[kind]}. ${capital(reader)} reads most from ${reader === read ? "itself" : read} (${percent(most.share)}).`);
}

function showReads(get, rows) {
  const list = reads(rows, state.position);
  showChooser(get("choose"), (position) => rows[state.position][position] / 255);
  fill(get("reads"), [`${capital(quoted(state.tokens[state.position]))} reads from`, "", "Share"],
    list.slice(0, 5).map(({ position, share }) => [word(state.tokens[position]), bar(share), share ? percent(share) : "< 0.2 %"])); // the service sends 256 shades
}

// --- the MLP, and the length of the vector

function showNeurons(get, { values: [row] }) {
  const most = Math.max(...row.map(Math.abs));
  const n_rows = Math.ceil(row.length / NEURONS_IN_A_ROW);
  const n_on = row.filter((value) => value > 0).length;
  const strong = row.filter((value) => value > Math.max(...row) / 2).length;
  const canvas = picture(`${row.length} neurons of layer ${state.layer}`, n_rows, NEURONS_IN_A_ROW,
    (i, j) => (row[i * NEURONS_IN_A_ROW + j] ?? 0) / most);
  get("neurons").replaceChildren(canvas);
  const about_strong = n_on ? ` ${strong} of them are above half of the strongest.` : "";
  say(get("neurons-about"), `For ${quoted(state.tokens[state.position])}, ${n_on} of ${row.length} neurons of layer ${state.layer} are positive.${about_strong} GELU lets little of the others through.`);
}

function showLengths(get, lengths) {
  const of_token = lengths.map((row) => row[state.position]);
  const most = Math.max(...of_token);
  const x = (i) => (100 * i) / (of_token.length - 1);
  const points = of_token.map((value, i) => `${x(i).toFixed(2)},${(48 - (46 * value) / most).toFixed(2)}`);
  const chart = element("svg", { class: "line lengths", viewBox: "0 0 100 50", preserveAspectRatio: "none", role: "img" },
    element("polygon", { points: `0,50 ${points.join(" ")} 100,50` }),
    element("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }),
    element("line", { x1: x(state.layer), x2: x(state.layer), y1: 0, y2: 50, "vector-effect": "non-scaling-stroke" }));
  chart.setAttribute("aria-label", `The length grows from ${whole(of_token[0])} to ${whole(of_token.at(-1))}`);
  get("norms").replaceChildren(chart);
  say(get("norms-about"), `After the embedding, the length is ${of_token[0].toPrecision(2)}; after layer ${state.layer}, ${of_token[state.layer].toPrecision(3)}. This layer changed it by ${signed(of_token[state.layer] - of_token[state.layer - 1])}.`);
}

const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toPrecision(2)}`;

byId("layer-number").addEventListener("input", (event) => set({ layer: Number(event.target.value) }));
on(["layer"], () => (byId("layer-output").value = state.layer));
