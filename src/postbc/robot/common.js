// What the live page and the review have in common: the server, the connection, who one is, messages, keys.
export const $ = (id) => document.getElementById(id);
const LOST_AFTER = 1500; // ms without an answer
let answered = -Infinity, lost = false, refused = "";

export const connected = () => !lost && answered > 0;

// JSON from the server; an Error with what it says, or that it does not answer.
export async function ask(path, body, timeout = LOST_AFTER) {
  const options = { cache: "no-store", signal: AbortSignal.timeout(timeout) };
  if (body !== undefined)
    Object.assign(options, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, priority: "high" });
  const response = await fetch(path, options);
  const text = await response.text();
  let found;
  try { found = JSON.parse(text); } catch { found = { error: text || response.statusText }; }
  if (!response.ok) throw Object.assign(new Error(found.error), { answered: true });
  return found;
}

// Ask for the state for ever: got(state) for every answer; whenLost(why) once answers stay out, and again when they change their reason.
// Returns what asks at once.
export function follow(path, every, got, whenLost) {
  const check = () => {
    if (lost || performance.now() - answered < LOST_AFTER) return;
    lost = true;
    $("connected").textContent = "connection lost";
    document.body.classList.add("lost");
    whenLost(refused);
  };
  let timer = 0, asking = false;
  async function once() {
    if (asking) return;
    asking = true;
    clearTimeout(timer);
    try {
      const state = await ask(path());
      answered = performance.now();
      lost = false;
      refused = "";
      document.body.classList.remove("lost", "waiting");
      $("connected").textContent = "connected";
      got(state);
    } catch (error) {
      if (error.answered && refused !== error.message) { refused = error.message; lost = false; }
      check();
    }
    asking = false;
    timer = setTimeout(once, every);
  }
  answered = performance.now() - LOST_AFTER / 2;
  setInterval(check, 200);
  once();
  return once;
}

export function alarm(text) {
  $("lost").textContent = text;
  $("lost").hidden = false;
}

// A message that stays a while; screen readers read it.
export function say(text, kind = "", seconds = 8, action = null) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  if (action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = action.text;
    button.onclick = () => { action.do(); line.remove(); };
    line.append(" ", button);
  }
  $("said").append(line);
  while ($("said").children.length > 4) $("said").firstChild.remove();
  setTimeout(() => line.remove(), seconds * 1000);
}

// -- who decides: asked once, kept in this browser -----------------------------------------------------------------------------------
export const who = () => $("name").value.trim();

export function askWho() {
  try { $("name").value = localStorage.getItem("postbc-name") || ""; } catch { /* a browser that keeps nothing */ }
  const keep = () => {
    try { localStorage.setItem("postbc-name", who()); } catch { /* the same */ }
    $("who").classList.toggle("missing", !who());
  };
  $("name").onchange = keep;
  $("who").onsubmit = (event) => { event.preventDefault(); $("name").blur(); };
  keep();
}

// -- buttons and keys ----------------------------------------------------------------------------------------------------------------
// A button that goes dead must not keep the focus: its keys would go nowhere.
export function enable(id, on) {
  const button = $(id);
  if (button.disabled === !on) return;
  const focused = document.activeElement === button;
  button.disabled = !on;
  if (focused && !on) document.querySelector("h2").focus();
}

// handle(key, target) -> whether it was meant; keys with Ctrl, Alt or Meta, and held ones, are the browser's.
export function keys(handle) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || event.isComposing) return;
    const at = event.target;
    const typing = at instanceof HTMLInputElement || at instanceof HTMLSelectElement;
    const native = at instanceof HTMLButtonElement || at instanceof HTMLAnchorElement;
    if (handle(event.key.length === 1 ? event.key.toLowerCase() : event.key, { typing, native })) {
      event.preventDefault();
      event.stopPropagation();
    }
  }, true);
}

const SIGNS = { success: "✓", failure: "✗", discard: "–", unlabelled: "?" };
export const WORDS = { success: "success", failure: "failure", discard: "discarded", unlabelled: "unlabelled" };

export function badge(label, number = null) {
  const made = document.createElement("span");
  made.className = `badge ${label}`;
  const sign = document.createElement("span");
  sign.setAttribute("aria-hidden", "true");
  sign.textContent = SIGNS[label] || "•";
  made.append(sign, ` ${WORDS[label] || label}${number === null ? "" : " " + number}`);
  return made;
}

export const clock = (seconds, digits = 1) => seconds < 60 ? `${seconds.toFixed(digits)} s` : `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
