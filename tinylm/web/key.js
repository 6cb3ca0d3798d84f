// The API key, where the service asks for one: kept in this tab's session alone.

const NAME = "tinylm-key";
const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
let answer = null; // of the dialog while it is open, so that two requests ask once

export const key = () => sessionStorage.getItem(NAME);

/** Whether the user gave a (new) key. */
export function askForKey(reason) {
  answer ??= new Promise((resolve) => {
    document.getElementById("key-reason").textContent = reason;
    field.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "given" && field.value.trim() !== "";
      if (given) sessionStorage.setItem(NAME, field.value.trim());
      answer = null;
      resolve(given);
    }, { once: true });
  });
  return answer;
}
