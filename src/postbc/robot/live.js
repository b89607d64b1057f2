// Beside a running robot: what it does, what the person is to do, and the buttons.
import { $, alarm, ask, askWho, badge, clock, connected, enable, follow, keys, say, who } from "./common.js";

const PHASES = { reset: "Reset the scene", running: "The robot is moving", label: "How did it go?", paused: "Paused", finished: "The session is over" };
const STOPS = { running: "Stop", reset: "Pause", paused: "End session" };
const STARTS = { paused: "Go on" };
const EMERGENCY = "Use the robot's own emergency stop.";
const STILL_AFTER = 2000; // ms without a step
const HEEDED_WITHIN = 1000; // ms from the press of stop
let state = null, moved = 0, started = -Infinity, stopping = 0, missed = 0; // when: last step, start, unheeded stop, stop that did not arrive

async function press(button) {
  if (button !== "stop" && $(button).disabled) return;
  const episode = state === null ? null : state.episode;
  missed = 0;
  if (button === "start") started = performance.now();
  if (button === "stop" && state !== null && state.phase === "running") {
    stopping = performance.now();
    $("phase").focus(); // one more Space must not press what this button is next
    show();
  }
  try {
    await ask("/press", { button, by: who(), episode: button === "start" || button === "stop" ? null : episode });
    again();
  } catch (error) {
    if (button === "stop" && !error.answered) {
      stopping = 0;
      missed = performance.now();
      show();
    } else say(error.message, "bad");
  }
}

function show() {
  const phase = state.phase, live = connected();
  document.body.dataset.phase = phase;
  put($("phase"), `${live ? "" : "Last known: "}${PHASES[phase] || phase}`);
  const still = phase === "running" && performance.now() - moved > STILL_AFTER;
  if (phase !== "running") stopping = 0;
  const unheeded = stopping && performance.now() - stopping > HEEDED_WITHIN;
  for (const id of ["success", "failure", "discard", "start", "undo", "stop"]) enable(id, live && state.buttons.includes(id));
  $("stop").classList.toggle("sent", Boolean(stopping));
  $("stop").classList.toggle("doubtful", Boolean(still || unheeded));
  put($("stop").querySelector(".text"), !live ? "Stop does not work" : stopping ? "Stopping …" : STOPS[phase] || "Stop");
  put($("start").querySelector(".text"), STARTS[phase] || "Scene is reset: start");
  if (phase !== "running") missed = 0;
  if (missed) alarm(`The stop did not reach the robot. ${EMERGENCY}`);
  else if (live) {
    if (unheeded) alarm(`The loop has not heeded the stop. ${EMERGENCY}`);
    else if (still) alarm(`The loop has made no step for ${Math.floor((performance.now() - moved) / 1000)} s: it may not heed a stop. Be ready to use the robot's own emergency stop.`);
    else $("lost").hidden = true;
  }
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text; // the same text again would be read again
}

function got(next) {
  if (state === null || next.step !== state.step || next.phase !== state.phase || next.episode !== state.episode) moved = performance.now();
  const before = state;
  state = next;
  put($("message"), next.message);
  put($("error"), next.error);
  $("error").hidden = !next.error;
  put($("episode"), next.episode === null ? `${next.episodes} episodes to play` : `episode ${next.episode} (${next.episode + 1} of ${next.episodes})`);
  const rate = next.rate ? ` · ${next.rate} Hz` : "";
  put($("step"), next.phase === "running" ? `step ${next.step}${next.max_steps ? ` of ${next.max_steps}` : ""}${rate}` : `for ${clock(Math.floor(next.seconds), 0)}`);
  $("progress").max = next.max_steps || 1;
  $("progress").value = next.phase === "running" ? next.step : 0;
  $("progress").hidden = !next.max_steps;
  $("counts").replaceChildren(...["success", "failure", "discard"].map((label) => badge(label, next.labels[label] || 0)));
  for (const { number, text } of next.notices) if (!noticed.has(number)) { noticed.add(number); if (before) say(text, "conflict", 15); }
  if (!next.cameras.length) put($("cameras"), "This robot shows no camera here: look at the robot itself.");
  for (const camera of next.cameras) if (!watched.has(camera)) watch(camera);
  show();
}
const noticed = new Set(), watched = new Set();

// A camera: the next picture is asked for when the last one is there, so a slow network gets fewer.
function watch(camera) {
  watched.add(camera);
  const figure = document.createElement("figure"), image = document.createElement("img"), caption = document.createElement("figcaption");
  image.alt = `Camera ${camera}, live`;
  caption.textContent = camera;
  figure.append(image, caption);
  figure.classList.add("dark");
  $("cameras").append(figure);
  let number = 0;
  const next = () => { image.src = `/frame/${encodeURIComponent(camera)}?${number++}`; };
  image.onload = () => { figure.classList.remove("dark"); setTimeout(next, 100); };
  image.onerror = () => { figure.classList.add("dark"); setTimeout(next, 1000); };
  next();
}

function whenLost(refused) {
  if (state !== null && state.phase === "finished") return alarm("The session is over, and its page is closed.");
  if (state !== null) show();
  if (!missed) alarm(refused ? `The page gets no state: ${refused}` : `No connection to the robot loop: no button works, STOP neither. ${EMERGENCY}`);
}

const KEYS = { s: "success", f: "failure", d: "discard", u: "undo", Enter: "start" };
keys((key, { typing, native }) => {
  if (state === null) return false;
  const panic = key === "Escape" || (key === " " && !typing); // what is shown may be a moment old: it may be moving already
  if (state.phase === "running" || (panic && performance.now() - started < 1000)) {
    // any key stops, as in the terminal; Tab and the like go on
    if (!panic && (typing || (key.length > 1 && key !== "Enter"))) return false;
    press("stop");
    return true;
  }
  if (panic && state.phase === "reset" && (key === "Escape" || !native)) {
    press("stop");
    return true;
  }
  if (typing || !(key in KEYS) || (native && key === "Enter")) return false;
  press(KEYS[key]);
  return true;
});
for (const id of ["success", "failure", "discard", "start", "undo", "stop"]) $(id).onclick = () => press(id);
askWho();
const again = follow(() => "/state", 200, got, whenLost);
setInterval(() => { if (state !== null) show(); }, 200);
