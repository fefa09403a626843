// Conversations and settings in the browser's own storage. Each conversation is an entry of its own, so that two tabs
// do not overwrite each other's.
const CONVERSATION = "conversation:";
const SETTINGS = "settings";

// A conversation is {id, changed, rounds: [{question, answer, state, failure}]}; state is "running", "done", "stopped"
// or "failed", changed in milliseconds since 1970.
export function create() {
  // crypto.randomUUID is missing on pages from other machines without TLS
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, changed: Date.now(), rounds: [] };
}

// All of them, the last changed first.
export function list() {
  return keys()
    .filter((key) => key.startsWith(CONVERSATION))
    .map(read)
    .filter((one) => one?.rounds?.length)
    .sort((one, other) => other.changed - one.changed);
}

export function load(id) {
  return read(CONVERSATION + id);
}

// False if there is no room for it.
export function save(conversation) {
  return write(CONVERSATION + conversation.id, conversation);
}

export function remove(id) {
  if (keys().includes(CONVERSATION + id)) {
    localStorage.removeItem(CONVERSATION + id);
  }
}

// Calls back with the id of each conversation that another tab has stored or (stored: null) removed.
export function watch(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(CONVERSATION)) {
      changed(key.slice(CONVERSATION.length), newValue && read(key));
    }
  });
}

export function loadSettings() {
  return read(SETTINGS) ?? {};
}

export function saveSettings(values) {
  write(SETTINGS, values);
}

function keys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return []; // storage is switched off
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // somebody else's, or storage is switched off
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
