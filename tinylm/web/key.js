// The API key, if the service needs one. It is stored only in this tab's session.

const NAME = "tinylm-key";
const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
let answer = null; // of the open dialog, so that two requests share it

export const key = () => sessionStorage.getItem(NAME);

/** Return whether the user gave a key. */
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
