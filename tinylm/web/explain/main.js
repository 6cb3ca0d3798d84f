// Begins the page: connects its parts, and follows the first sentence.

import "./batch.js";
import "./cache.js";
import { byId } from "./dom.js";
import { startOverview } from "./overview.js";
import { open } from "./part.js";
import { showSliders } from "./sampling.js";
import { follow } from "./sentence.js";
import "./tour.js";

showSliders();
startOverview();
follow(byId("sentence").value);
const linked = byId(location.hash.slice(1));
if (linked?.matches("details")) open(linked.id);
