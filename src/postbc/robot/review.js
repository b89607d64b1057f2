// Over recorded episodes: look at each, say what it is, see what others say.
import { $, alarm, ask, askWho, badge, clock, connected, enable, follow, keys, say, who, WORDS } from "./common.js";

let episodes = [], seen = "", selected = null, kept = null; // kept: the list as it was filtered; labels do not take episodes out under one's eyes
const told = new Set();
let first = true;
let decided = 0, asked = 0; // labels given and taken back here: by now, and when the state that is awaited was asked for

const disagreed = (e) => new Set(Object.values(e.opinions)).size > 1;
const FILTERS = {
  all: () => true, unlabelled: (e) => !e.label, success: (e) => e.label === "success", failure: (e) => e.label === "failure",
  discard: (e) => e.label === "discard", disagreement: disagreed,
};
const find = (number) => episodes.find((e) => e.episode === number);
const said = (e) => Object.entries(e.opinions).map(([by, label]) => `${by || "somebody"} says ${WORDS[label]}`).join(", ");

function filtered() {
  const fits = FILTERS[$("filter").value];
  if (kept === null) kept = new Set(episodes.filter(fits).map((e) => e.episode));
  for (const e of episodes) if (fits(e)) kept.add(e.episode);
  return episodes.filter((e) => kept.has(e.episode));
}

function show() {
  const list = filtered();
  if (!list.some((e) => e.episode === selected)) select(list.length ? list[0].episode : null);
  $("list").replaceChildren(...list.map((e) => {
    const item = document.createElement("li"), button = document.createElement("button"), number = document.createElement("b"), length = document.createElement("span");
    number.textContent = e.episode;
    length.className = "length";
    length.textContent = e.error ? "cannot be read" : `${e.steps} steps${e.seconds === null ? "" : ` · ${clock(e.seconds)}`}`;
    button.type = "button";
    button.setAttribute("aria-label", `Episode ${e.episode}, ${length.textContent}, ${WORDS[e.label] || "unlabelled"}${disagreed(e) ? ", people disagree" : ""}`);
    if (e.episode === selected) button.setAttribute("aria-current", "true");
    button.append(number, length, badge(e.label || "unlabelled"));
    if (disagreed(e)) {
      const mark = document.createElement("span");
      mark.className = "differ";
      mark.textContent = "≠";
      mark.title = said(e);
      button.append(mark);
    }
    button.onclick = () => { select(e.episode); show(); };
    item.append(button);
    return item;
  }));
  $("empty").hidden = list.length > 0;
  $("empty").textContent = episodes.length ? "No episode is like that." : "No episode is recorded yet; they appear here as they come.";
  about();
}

// What is said of the selected episode.
function about() {
  const e = find(selected), list = filtered(), place = list.findIndex((other) => other.episode === selected);
  if (!e) $("opinions").replaceChildren();
  else {
    const names = Object.keys(e.opinions), parts = [badge(e.label || "unlabelled")];
    if (disagreed(e)) parts.push(` ${said(e)}; the last one counts.`);
    else if (names.some((name) => name)) parts.push(` says ${names.filter((name) => name).join(" and ")}`);
    if ($("opinions").textContent !== parts.map((p) => p.textContent ?? p).join("")) $("opinions").replaceChildren(...parts);
    $("opinions").classList.toggle("conflict", disagreed(e));
  }
  const live = connected() && Boolean(e);
  for (const label of ["success", "failure", "discard"]) {
    enable(label, live && (!e.error || label === "discard"));
    $(label).setAttribute("aria-pressed", String(Boolean(e) && e.label === label));
  }
  enable("before", place > 0);
  enable("after", place >= 0 && place < list.length - 1);
  enable("undo", connected() && episodes.some((other) => other.label && who() in other.opinions));
}

function select(number) {
  if (selected === number) return;
  selected = number;
  const e = find(number), film = $("film"), none = $("nofilm");
  $("episode").textContent = e ? `Episode ${number}` : "No episode";
  $("facts").textContent = e && !e.error ? `${e.steps} steps${e.seconds === null ? " · the file does not say its rate: shown at 20 a second" : ` · ${clock(e.seconds)}`}` : "";
  none.hidden = !e || Boolean(e.cameras);
  none.textContent = !e ? "" : e.error || "This episode has no camera: only states were recorded.";
  film.hidden = !e || !e.cameras;
  document.querySelector(".speed").hidden = film.hidden;
  if (film.hidden) { film.removeAttribute("src"); film.load(); return; }
  film.removeAttribute("src");
  film.load();
  clearTimeout(opening);
  opening = setTimeout(() => open(number), 150); // not for each that one only passes by
}
let opening = 0;

function open(number) {
  const film = $("film");
  if (number !== selected) return;
  film.src = `/film/${number}.mp4`;
  film.playbackRate = film.defaultPlaybackRate = Number($("speed").value);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) film.play().catch(() => {});
  const list = filtered(), following = list[list.findIndex((other) => other.episode === number) + 1];
  film.onloadeddata = following && following.cameras ? () => { fetch(`/film/${following.episode}.mp4`, { method: "HEAD" }).catch(() => {}); } : null;
}

$("film").onerror = async () => {
  if ($("film").hidden || !$("film").getAttribute("src")) return;
  const answer = await fetch($("film").src).catch(() => null);
  const found = answer && !answer.ok ? await answer.json().catch(() => null) : null;
  $("nofilm").textContent = found ? found.error : "The film cannot be shown here.";
  $("nofilm").hidden = false;
  $("film").hidden = true;
};

function move(by) {
  const list = filtered(), next = list[list.findIndex((e) => e.episode === selected) + by];
  if (!next) return;
  select(next.episode);
  show();
  document.querySelector("[aria-current]").scrollIntoView({ block: "nearest" });
}

async function label(label) {
  const episode = selected;
  if ($(label).disabled) return;
  if (!who()) {
    $("name").focus();
    return say("Say who you are first: decisions have names.", "bad");
  }
  try {
    await ask("/label", { episode, label, by: who() }, 5000);
    decided += 1;
    const e = find(episode);
    e.label = label;
    e.opinions[who()] = label; // what the next state will say
    say(`Episode ${episode}: ${WORDS[label]}`, "good", 3);
    if (selected === episode) move(1);
    show();
  } catch (error) { failed(error); }
}

async function undo() {
  if ($("undo").disabled) return;
  try {
    const { episode } = await ask("/undo", { by: who() }, 5000);
    decided += 1;
    const e = find(episode);
    if (e) { e.label = null; e.opinions = {}; kept.add(episode); select(episode); }
    say(`Episode ${episode} has no label now.`, "good", 4);
    show();
  } catch (error) { failed(error); }
}

function failed(error) {
  if (error.answered) say(error.message, "bad");
  else say("There was no answer: look again whether the label is there.", "bad", 15);
}

function got(state) {
  $("lost").hidden = true;
  if (state.seen !== seen && state.episodes && asked === decided) { // an older state may lack the last decision: the next has it
    seen = state.seen;
    episodes = state.episodes;
    $("counts").replaceChildren(...Object.entries(state.labels).map(([name, number]) => badge(name, number)));
    for (const e of episodes) {
      const what = `${e.episode} ${JSON.stringify(e.opinions)}`;
      if (!disagreed(e) || told.has(what)) continue;
      told.add(what);
      if (!first && (who() in e.opinions || e.episode === selected))
        say(`Episode ${e.episode}: ${said(e)}. The last one counts: ${WORDS[e.label]}.`, "conflict", 20, { text: "Look", do: () => { kept.add(e.episode); select(e.episode); show(); } });
    }
    first = false;
    show();
  } else about();
}

function whenLost(refused) {
  about();
  alarm(refused ? `The page gets no state: ${refused}` : "No connection: labels cannot be given now. Is `postbc robot label` still running?");
}

const KEYS = { s: "success", f: "failure", d: "discard" };
keys((key, { typing, native }) => {
  if (typing) return false;
  if (key in KEYS) label(KEYS[key]);
  else if (key === "u") undo();
  else if (key === "ArrowLeft" || key === "ArrowUp") move(-1);
  else if (key === "ArrowRight" || key === "ArrowDown") move(1);
  else if (key === " " && !native) { const film = $("film"); if (film.ended || film.paused) film.play().catch(() => {}); else film.pause(); }
  else return false;
  return true;
});
for (const name of ["success", "failure", "discard"]) $(name).onclick = () => label(name);
$("undo").onclick = undo;
$("before").onclick = () => move(-1);
$("after").onclick = () => move(1);
$("filter").onchange = () => { kept = null; show(); $("filter").blur(); };
$("speed").onchange = () => { $("film").playbackRate = $("film").defaultPlaybackRate = Number($("speed").value); $("speed").blur(); };
askWho();
follow(() => { asked = decided; return `/state?seen=${seen}`; }, 500, got, whenLost);
