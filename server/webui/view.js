// Rounds of a conversation as elements.
import { fenced, isCode, render } from "/web/markdown.js";
import { text } from "/web/text.js";

const log = document.querySelector("#log");
const rounds = document.querySelector("#rounds");
const empty = document.querySelector("#empty");
const NEAR = 40; // pixels from the end that still are the end

// Whether the reader follows the conversation as it grows. What the reader does decides, not where the end is when the
// next word comes: that may be before a smooth scroll upwards, or a small one, has got far.
let following = true;
let seen = { top: 0, room: 0 };
const look = () => ({ top: log.scrollTop, room: log.scrollHeight - log.clientHeight });
log.addEventListener("scroll", () => {
  const { top, room } = look();
  if (top < seen.top && room >= seen.room) { // else there is less to scroll than before
    following = false;
  } else if (room - top < NEAR) {
    following = true;
  }
  seen = { top, room };
});
const leave = () => (following &&= log.scrollTop === 0);
log.addEventListener("wheel", (event) => event.deltaY < 0 && leave(), { passive: true });
addEventListener("keydown", (event) => {
  if (["PageUp", "ArrowUp", "Home"].includes(event.key) && !event.target.matches?.("textarea, input")) {
    leave();
  }
});

// Show all of a conversation; actions: what the buttons below a round call, see forRound.
export function show(conversation, actions) {
  rounds.replaceChildren();
  empty.hidden = conversation.rounds.length > 0;
  conversation.rounds.forEach((round) => update(conversation, round, actions));
}

// Show what is new about one of its rounds, which may be the first time that it is shown.
export function update(conversation, round, actions) {
  empty.hidden = conversation.rounds.length > 0;
  const index = conversation.rounds.indexOf(round);
  const isNew = index === rounds.children.length;
  const element = isNew ? rounds.appendChild(made(round)) : rounds.children[index];
  const [, answer, note, buttons] = element.children;
  element.classList.toggle("running", round.state === "running");
  element.setAttribute("aria-busy", round.state === "running"); // screen readers wait, instead of starting over
  render(answer, index === 0 && isCode(round.question) ? fenced(round.answer) : round.answer);
  if (round.state === "running") {
    note.textContent = round.answer ? "" : text.thinking;
    buttons.replaceChildren();
  } else {
    note.textContent = round.failure ?? (round.state === "stopped" ? text.stopped : "");
    note.classList.toggle("failed", round.state === "failed");
    for (const block of answer.querySelectorAll("pre")) {
      const code = block.textContent;
      // not ":has(button)": Firefox 115, the last one for Windows 7, does not know that
      if (!block.querySelector("button")) {
        block.append(button(text.copy, (own) => copy(code, own)));
      }
    }
    buttons.replaceChildren(...forRound(round, round === conversation.rounds.at(-1), actions));
  }
  if (isNew && index > 0) {
    update(conversation, conversation.rounds[index - 1], actions); // which is the last one no more
  }
  following ||= isNew; // who asks wants to see it
  if (following) {
    log.scrollTop = log.scrollHeight;
  }
  seen = look();
}

// Show whether the next question comes in the place of the last round.
export function markEdited(wanted) {
  rounds.lastElementChild?.classList.toggle("edited", wanted);
}

function made(round) {
  const element = document.createElement("article");
  for (const name of ["question", "answer", "note", "buttons"]) {
    const part = document.createElement("div");
    part.className = name;
    element.append(part);
  }
  element.firstChild.textContent = round.question;
  return element;
}

// The last round can also be continued, answered again, and taken back.
function forRound(round, last, { again, goOn, edit }) {
  const found = [];
  if (round.answer) {
    found.push(button(text.copy, (own) => copy(round.answer, own)));
  }
  if (last && round.answer && round.state !== "done") {
    found.push(button(text.continue, () => goOn(round)));
  }
  if (last) {
    found.push(button(text.again, () => again(round)), button(text.edit, () => edit(round)));
  }
  return found;
}

export function button(label, act) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.addEventListener("click", () => act(element));
  return element;
}

async function copy(content, own) {
  try {
    await navigator.clipboard.writeText(content);
  } catch { // not there on a page from another machine without TLS
    const area = document.createElement("textarea");
    area.value = content;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) {
      return;
    }
  }
  own.textContent = text.copied;
  setTimeout(() => (own.textContent = text.copy), 1500);
}
