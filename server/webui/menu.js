// On small screens the list of conversations lies over the page.
const menu = document.querySelector("#menu");

export function showMenu(wanted) {
  document.body.classList.toggle("menu", wanted);
  menu.setAttribute("aria-expanded", wanted);
}

addEventListener("click", (event) => {
  // it covers its button: what closes it is a click beside it, or on the conversation that is shown already
  if (!event.target.closest("#side") || event.target.closest("#list a")) {
    showMenu(menu.contains(event.target) && !document.body.classList.contains("menu"));
  }
});
addEventListener("keydown", (event) => event.key === "Escape" && showMenu(false));
