// A row of the sentence's tokens, of which one is chosen. All rows choose the same token.

import { make, word } from "./dom.js";
import { set, state } from "./state.js";

/** Show the tokens inside `place`. `shadeOf(position)` gives a share from 0 to 1 that tints a token. */
export function showChooser(place, shadeOf = () => 0) {
  const key = state.tokens.map((token) => token.id).join();
  if (place.dataset.key !== key) {
    place.dataset.key = key;
    build(place);
  }
  for (const input of place.querySelectorAll("input")) {
    input.checked = Number(input.value) === state.position;
    input.parentElement.style.setProperty("--shade", `${Math.round(100 * shadeOf(Number(input.value)))}%`);
  }
}

function build(place) {
  const name = `token-of-${place.closest("details").id}`;
  const row = make("fieldset", { class: "chooser" }, make("legend", {}, "Choose a token"));
  state.tokens.forEach((token, position) => {
    const input = make("input", { type: "radio", name, value: position, autocomplete: "off" });
    input.addEventListener("change", () => set({ position }));
    row.append(make("label", {}, input, word(token)));
  });
  place.replaceChildren(row);
}
