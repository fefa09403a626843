// The page: which conversation is shown, questions on their way, the list of earlier ones.
import { generate, interrupt, Refused } from "/web/client.js";
import { isCode } from "/web/markdown.js";
import { showMenu } from "/web/menu.js";
import { chosen, forgetPrefix } from "/web/settings.js";
import * as store from "/web/store.js";
import { text } from "/web/text.js";
import { button, markEdited, show, update } from "/web/view.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer comes
const SILENT = 5000; // milliseconds since the last save, after which an answer comes in no other tab either

const [form, question, send, stop, list, problem] = ["#ask", "#question", "#send", "#stop", "#list", "#problem"].map(
  (name) => document.querySelector(name),
);
const running = new Map(); // conversation's id -> {conversation, controller, request}
const PATIENCE = 2000; // milliseconds from the Stop button until the connection is cut
const TOUCH = matchMedia("(pointer: coarse)"); // no keyboard but the one on the screen
const STOPPED = { state: "stopped" };
const BROKEN_OFF = { state: "failed", failure: text.brokenOff };
const actions = { again, goOn, edit };
let current = store.create();
let edited = null; // the round in whose place the next question comes

// ---- conversations ----

function open(conversation) {
  current = conversation;
  edited = null;
  markBrokenOff();
  show(current, actions);
  showState();
  if (!TOUCH.matches) { // there it would bring up the keyboard
    question.focus();
  }
}

// What the address names after "#": the one that is being answered here, else the stored one, else a new one.
function openNamed() {
  const id = location.hash.slice(1);
  open(running.get(id)?.conversation ?? store.load(id) ?? store.create());
}

// Rounds that were on their way in a tab that is gone. The server says something every 1.5 seconds, so that a tab that
// is there has saved.
function markBrokenOff() {
  const gone = !running.has(current.id) && Date.now() - current.changed > SILENT;
  const rounds = gone ? current.rounds.filter((round) => round.state === "running") : [];
  rounds.forEach((round) => Object.assign(round, BROKEN_OFF));
  return rounds.length > 0;
}

// Another tab has gone on with a conversation, or removed it: an old copy here would overwrite that.
function follow(id, stored) {
  const same = current.id === id && stored && stored.rounds.length === current.rounds.length;
  if (running.has(id)) {
    if (stored) {
      return; // the one here goes on
    }
    running.get(id).controller.abort();
    running.delete(id);
  }
  if (same && stored.rounds.at(-1).question === current.rounds.at(-1).question) {
    const wasBusy = isBusy();
    Object.assign(current, stored);
    update(current, current.rounds.at(-1), actions);
    if (isBusy() === wasBusy) {
      return; // a little more of an answer: the list stays under the pointer
    }
  } else if (current.id === id) {
    current = stored ?? store.create();
    show(current, actions);
  } else if (stored && [...list.querySelectorAll("a")].some((link) => link.hash === `#${id}`)) {
    return; // not shown, and listed already
  }
  showState();
}

// Whether the conversation shown waits for an answer, here or in another tab.
function isBusy() {
  return current.rounds.at(-1)?.state === "running";
}

function begin() {
  history.pushState(null, "", location.pathname);
  open(store.create());
}

function showState() {
  send.hidden = running.has(current.id);
  stop.hidden = !send.hidden;
  send.disabled = isBusy();
  showMenu(false);
  list.replaceChildren(...store.list().map(entry));
}

function entry(conversation) {
  const row = document.createElement("div");
  const link = document.createElement("a");
  link.href = `#${conversation.id}`;
  link.textContent = conversation.rounds[0].question;
  row.classList.toggle("current", conversation.id === current.id);
  row.append(link, button("✕", () => discard(conversation)));
  row.lastChild.title = text.remove;
  row.lastChild.setAttribute("aria-label", `${text.remove}: ${link.textContent.slice(0, 40)}`);
  return row;
}

function discard(conversation) {
  if (!confirm(text.removeAll(conversation.rounds[0].question.slice(0, 40)))) {
    return;
  }
  running.get(conversation.id)?.controller.abort();
  running.delete(conversation.id);
  store.remove(conversation.id);
  if (conversation.id === current.id) {
    begin();
  } else {
    showState();
  }
}

// ---- questions ----

function ask(asked) {
  const conversation = current;
  const round = { question: asked, answer: "" };
  const options = chosen();
  if (edited && edited === conversation.rounds.at(-1)) {
    conversation.rounds.pop();
    show(conversation, actions);
  }
  edited = null;
  conversation.rounds.push(round);
  history.replaceState(null, "", `#${conversation.id}`);
  forgetPrefix();
  return answer(conversation, round, options);
}

function again(round) {
  const options = chosen();
  setEdited(null);
  forgetPrefix();
  return answer(current, Object.assign(round, { answer: "" }), options);
}

function goOn(round) {
  setEdited(null);
  return answer(current, round, { ...chosen(), answer_prefix: round.answer });
}

// The old answer stays until the new question is sent: a slip of the finger, or a closed page, does not lose it.
function edit(round) {
  setEdited(round);
  question.value = round.question;
  grow();
  question.focus();
}

function setEdited(round) {
  edited = round;
  markEdited(Boolean(round));
}

async function answer(conversation, round, options) {
  const earlier = conversation.rounds.slice(0, conversation.rounds.indexOf(round));
  const rounds = earlier.filter((one) => one.answer).map((one) => [one.question, one.answer]);
  const run = { conversation, controller: new AbortController(), request: null };
  running.set(conversation.id, run);
  Object.assign(round, { state: "running", failure: undefined });
  progress(conversation, round);
  keep(conversation);
  showState();
  try {
    await read(run, round, { query: round.question, history: rounds, ...options });
    Object.assign(round, run.ended ?? { state: "done" });
  } catch (error) {
    const known = error instanceof Refused ? error.message : run.request ? text.lost : text.unreachable;
    Object.assign(round, run.controller.signal.aborted ? run.ended : { state: "failed", failure: known });
  }
  if (running.get(conversation.id) !== run) {
    return; // deleted meanwhile
  }
  running.delete(conversation.id);
  keep(conversation);
  progress(conversation, round);
  showState();
}

async function read(run, round, fields) {
  let saved = performance.now();
  const started = (id) => (run.request = id);
  for await (const sofar of generate(fields, run.controller.signal, started)) {
    round.answer = sofar;
    run.frame ??= requestAnimationFrame(() => {
      run.frame = undefined;
      progress(run.conversation, round);
    });
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      keep(run.conversation);
    }
  }
}

function progress(conversation, round) {
  if (conversation === current) {
    update(conversation, round, actions);
  }
}

function keep(conversation) {
  conversation.changed = Date.now();
  if (conversation.rounds.length === 0) {
    store.remove(conversation.id);
  } else {
    say(store.save(conversation) ? "" : text.storageFull);
  }
}

function say(sentence) {
  problem.textContent = sentence;
  problem.hidden = !sentence;
}

function halt() {
  const run = running.get(current.id);
  run.ended = STOPPED;
  if (!run.request) {
    return run.controller.abort(); // it still waits for its turn
  }
  interrupt(run.request).catch(() => run.controller.abort());
  // browsers open six connections to a server: as many answers at once, and the request above would wait for one's end
  setTimeout(() => run.controller.abort(), PATIENCE);
}

// ---- what the user does ----

function submit() {
  const asked = isCode(question.value) ? question.value : question.value.trim();
  if (asked && !isBusy()) {
    question.value = "";
    grow();
    ask(asked);
  }
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("keydown", (event) => {
  // while an input method is composing, Enter chooses among its words (229: Safari says it so); keyboards on screens
  // have no Shift+Enter
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !TOUCH.matches) {
    event.preventDefault();
    submit();
  }
});
question.addEventListener("input", () => {
  grow();
  setEdited(question.value ? edited : null); // emptied: what is written then is another question
});
stop.addEventListener("click", halt);
document.querySelector("#new").addEventListener("click", begin);
for (const suggestion of document.querySelectorAll("#empty button")) {
  suggestion.addEventListener("click", () => ask(suggestion.textContent));
}
addEventListener("hashchange", openNamed);
addEventListener("pagehide", () => {
  for (const run of running.values()) {
    run.ended = BROKEN_OFF;
    Object.assign(run.conversation.rounds.at(-1), BROKEN_OFF); // at once, for other tabs
    keep(run.conversation);
    run.controller.abort(); // browsers may keep a page that was left, and its connections with it
  }
});
store.watch(follow);
setInterval(() => {
  if (markBrokenOff()) {
    show(current, actions);
    showState();
  }
}, SILENT);
if (TOUCH.matches) {
  question.placeholder = question.ariaLabel;
}
grow(); // on small screens the hint in the empty field has two lines
openNamed();
