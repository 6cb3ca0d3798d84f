// The tour: one question at a time, inside the part that it is about. It notices when the page shows an answer.

import { byId, make, say } from "./dom.js";
import { open } from "./part.js";
import { QUESTIONS } from "./questions.js";
import { Outdated } from "./service.js";
import { on, state } from "./state.js";

const card = byId("tour");
const [title, hint, result, code, next] = ["question", "tour-hint", "tour-result", "tour-code", "tour-next"].map(byId);
const home = card.parentElement;
let at = -1; // the question that is shown
let is_solved = false;

async function go(number) {
  const before = QUESTIONS[at]?.part;
  at = number;
  is_solved = true; // until the question has begun
  const question = QUESTIONS[at];
  if (before && before !== question.part) byId(before).open = false; // the page stays short
  open(question.part);
  byId(question.part).querySelector(".body").prepend(card);
  card.hidden = false;
  byId("tour-number").textContent = `Question ${at + 1} of ${QUESTIONS.length}`;
  title.textContent = question.ask;
  hint.textContent = question.hint;
  result.textContent = "";
  code.hidden = true;
  card.classList.remove("solved");
  next.textContent = "Skip";
  next.className = "second";
  byId("tour-back").hidden = at === 0;
  byId("tour-show").hidden = false;
  title.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
  card.setAttribute("aria-busy", "true");
  await attempt(question.begin);
  if (at !== number) return;
  card.setAttribute("aria-busy", "false");
  is_solved = false;
  check();
}

/** Return what a function of a question returns, or null if it fails. A changed sentence is no failure to talk about. */
async function attempt(action) {
  try {
    return await action?.();
  } catch (error) {
    if (!(error instanceof Outdated)) say(hint, error.message);
    return null;
  }
}

/** See whether the page shows an answer, and say so once. */
async function check() {
  if (at < 0 || is_solved || !state.tokens.length) return;
  const number = at;
  const question = QUESTIONS[at];
  const found = await attempt(question.solved);
  if (!found || number !== at || is_solved) return;
  is_solved = true;
  card.classList.add("solved");
  say(result, `Yes. ${question.say()}`);
  result.scrollIntoView({ block: "nearest" });
  if (document.activeElement === byId("sentence")) next.focus(); // it is far from the question
  const [file, name] = question.code;
  code.replaceChildren("In the code: ", make("code", {}, name), " in ", make("code", {}, file));
  code.hidden = false;
  byId("tour-show").hidden = true;
  next.className = "primary";
  next.textContent = at + 1 < QUESTIONS.length ? "Next question" : "Finish the tour";
}

function finish(message) {
  at = -1;
  card.hidden = true;
  home.append(card);
  const start = byId("tour-start");
  start.textContent = "Start the tour again";
  start.focus();
  start.scrollIntoView({ block: "center" });
  say(byId("busy"), message);
}

next.addEventListener("click", () => (at + 1 < QUESTIONS.length ? go(at + 1) : finish("You have finished the tour.")));
byId("tour-back").addEventListener("click", () => go(at - 1));
byId("tour-show").addEventListener("click", () => {
  attempt(QUESTIONS[at].show);
  title.focus();
});
byId("tour-sentence").addEventListener("click", () => byId("sentence").focus());
byId("tour-end").addEventListener("click", () => finish("The tour has ended."));
byId("tour-start").addEventListener("click", () => go(0));
on(["tokens", "position", "layer", "head", "matmul", "settings", "choice", "shared"], check);
byId("length").addEventListener("input", check);
