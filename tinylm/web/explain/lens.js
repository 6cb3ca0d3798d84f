// The part `lens`: what the model would answer after each layer.

import { showChooser } from "./chooser.js";
import { fill, make, percent, quoted, say, word } from "./dom.js";
import { part } from "./part.js";
import { ask } from "./service.js";
import { set, state } from "./state.js";

const TOP = 3; // tokens of each layer

export const lens = (position = state.tokens.length - 1, later = false) => ask("lens", { position, top: TOP }, later);

/** Return the first layer, from 1, after which the final answer has rank 1 until the end. */
export function settledAfter(ranks) {
  return ranks.findLastIndex((rank) => rank > 1) + 2;
}

part("lens", ["position", "layer"], () => lens(state.position), (found, get) => {
  showChooser(get("choose"));
  const { position, tokens } = state;
  const answer = found.answers[position];
  const ranks = found.ranks.map((row) => row[position]);
  const after = position === tokens.length - 1 ? "the sentence" : quoted(tokens[position]);
  say(get("about"), `After ${after}, the whole model answers ${quoted(answer)}. After layer ${state.layer}, this token has rank ${ranks[state.layer - 1]}.`);
  const table = get("table");
  fill(table, ["Layer", "Rank", "First", "Second", "Third"], found.top.map((candidates, at) => ({
    class: at + 1 === state.layer ? "chosen" : null,
    cells: [layerButton(at + 1), ranks[at], ...candidates.map((candidate) => cell(candidate, answer))],
  })));
});

function cell({ token, probability }, answer) {
  const made = make("span", { class: token.id === answer.id ? "candidate final" : "candidate" }, word(token), " ",
    make("span", { class: "muted" }, percent(probability)));
  made.style.setProperty("--shade", `${Math.round(40 * probability)}%`);
  return made;
}

function layerButton(layer) {
  const input = make("input", { type: "radio", name: "layer-of-lens", value: layer, autocomplete: "off", "aria-label": `Layer ${layer}` });
  input.checked = layer === state.layer;
  const had_focus = document.activeElement?.name === "layer-of-lens" && layer === state.layer;
  if (had_focus) requestAnimationFrame(() => input.focus());
  input.addEventListener("change", () => set({ layer }));
  return make("label", { class: "pick" }, input, make("span", {}, layer));
}
