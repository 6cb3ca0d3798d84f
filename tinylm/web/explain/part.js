// A part of the page: it asks for its data and shows them while it is open, and again after each change.

import { byId } from "./dom.js";
import { Outdated } from "./service.js";
import { on, state } from "./state.js";

const scheme = matchMedia("(prefers-color-scheme: dark)");
let shown = ""; // the part that was opened last

/** Connect a part. `load()` returns its data. `show(data, get)` shows them; `get(name)` finds an element of the part by its `data-is`.
    names: fields of the state after whose change the part is shown again. */
export function part(id, names, load, show) {
  const details = byId(id);
  const get = (name) => details.querySelector(`[data-is="${name}"]`);
  let latest = 0;
  const redraw = async () => {
    if (!details.open || !state.text) return;
    const run = ++latest;
    details.setAttribute("aria-busy", "true");
    try {
      const data = await load();
      if (run !== latest) return;
      const focus = document.activeElement;
      for (const finding of details.querySelectorAll(".finding")) {
        const is_its_part = details.contains(focus) && (!finding.dataset.of || finding.dataset.of === focus.id);
        finding.ariaLive = is_its_part ? "polite" : "off"; // several parts can be open
      }
      show(data, get);
      details.querySelector(".body > .error")?.remove();
    } catch (error) {
      if (run !== latest || error instanceof Outdated) return;
      details.querySelector(".body > .error")?.remove();
      const message = Object.assign(document.createElement("p"), { className: "error", textContent: error.message });
      details.querySelector(".body").prepend(message);
    }
    details.setAttribute("aria-busy", "false");
  };
  details.addEventListener("toggle", () => {
    if (details.open) remember(id);
    else if (shown === id) remember("");
    redraw();
  });
  scheme.addEventListener("change", redraw); // the colours of pictures
  on(["tokens", ...names], redraw);
}

/** Write part and sentence into the address, so that a copied link shows both. The server never sees this end of an address. */
export function remember(id = shown) {
  shown = id;
  if (!state.text) return; // the address may have a sentence that the service has not accepted yet
  const text = `text=${encodeURIComponent(state.text)}`;
  history.replaceState(null, "", `#${shown ? `${shown}&` : ""}${text}`);
}

/** Open a part and move the focus to its title. */
export function open(id) {
  const details = byId(id);
  details.open = true;
  remember(id);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  details.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  details.querySelector("summary").focus({ preventScroll: true });
}
