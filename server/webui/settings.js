// The fields of /generate that the user may set. Numbers are kept for later visits, the answer's beginning is not.
import { loadSettings, saveSettings } from "/web/store.js";

const inputs = document.querySelectorAll("#settings input");

// Those that are filled in, and rightly, by name.
export function chosen() {
  const filled = [...inputs].filter((input) => input.value !== "" && input.validity.valid);
  return Object.fromEntries(filled.map((input) => [input.name, input.type === "number" ? +input.value : input.value]));
}

// It is for one question.
export function forgetPrefix() {
  document.querySelector("[name=answer_prefix]").value = "";
}

for (const input of inputs) {
  if (input.type === "number") {
    input.value = loadSettings()[input.name] ?? "";
    input.addEventListener("change", () => saveSettings({ ...loadSettings(), [input.name]: input.value }));
  }
}
