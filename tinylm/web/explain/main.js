// Begins the page: connects its parts, and follows the first sentence.

import "./batch.js";
import "./cache.js";
import { byId } from "./dom.js";
import { startOverview } from "./overview.js";
import { open, remember } from "./part.js";
import { showSliders } from "./sampling.js";
import { follow } from "./sentence.js";
import "./tour.js";

showSliders();
startOverview();
const link = new URLSearchParams(location.hash.slice(1)); // #layer&text=The+dog opens a part with a sentence
follow(link.get("text") || byId("sentence").value);
addEventListener("hashchange", () => {
  if (new URLSearchParams(location.hash.slice(1)).has("text")) location.reload(); // a pasted link
  else remember();
});
for (const [name] of link) if (byId(name)?.matches("details")) open(name);
