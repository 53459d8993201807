// The page: an address becomes a question, a question becomes sounds. Everything on it follows from the address.

import * as address from "./address.js";
import { ask, browse, filterText, latest, search, withIds } from "./api.js";
import * as facets from "./facets.js";
import * as map from "./map.js";
import * as player from "./player.js";
import * as query from "./query.js";
import * as record from "./record.js";
import * as results from "./results.js";
import * as uploads from "./uploads.js";

const $ = (id) => document.getElementById(id);
const HITS = 20, MOST_IN_AREA = 300;
let state = address.read();
let release = null;
let asked = ""; // the question that the list answers
const names = new Map(); // of items, for what is shown by id alone

// --- from the address to the page ----------------------------------------------------------------------------------

function go(changes, replace = false) {
  state = { ...state, ...changes };
  address.write(state, replace);
  render();
}

const fresh = { text: "", item: "", upload: "", from: null, to: null, plus: [], minus: [], area: null };
const find = latest(async (signal) => {
  const ids = state.area && map.loaded() ? map.idsIn(state.area, MOST_IN_AREA) : null;
  if (ids && !ids.length) return { results: [] };
  if (address.hasQuery(state)) {
    const upload = state.upload ? await uploads.find(state.upload) : null;
    if (state.upload && !upload) throw new Error("this sound is no longer kept by your browser: drop it again");
    return search(state, upload, HITS, ids, signal);
  }
  if (ids || filterText(state.filter)) return { ...(await browse(state, 3 * HITS, ids, signal)), browsing: true };
  return { ...(await ask("examples", { signal })), welcome: true };
});

async function render() {
  const { filter, view, plus, minus } = state;
  document.body.classList.toggle("asking", address.hasQuery(state));
  $("text").value = state.text;
  $("parts").checked = state.part;
  for (const name of ["list", "map"]) $(`view-${name}`).setAttribute("aria-pressed", String(view === name));
  facets.render(filter);
  chips();
  showQuery();
  await showMap();
  const question = JSON.stringify([state.text, state.item, state.upload, state.from, state.to, plus, minus, state.part, filter, state.area]);
  if (question === asked) return;
  asked = question;
  $("problem").hidden = true;
  document.body.ariaBusy = "true";
  if (address.hasQuery(state)) $("status").textContent = "listening…";
  results.loading(address.hasQuery(state) ? 6 : 3);
  const { answer, error, stale } = await find();
  if (stale) return;
  document.body.ariaBusy = "false";
  if (error) fail(error); else show(answer);
}

function show(answer) {
  const hits = withIds(answer.results ?? answer.items);
  hits.forEach((hit) => names.set(hit.key, hit.uri));
  document.body.classList.toggle("welcome", Boolean(answer.welcome));
  document.body.classList.toggle("browsing", Boolean(answer.browsing));
  $("toolbar").hidden = false;
  $("results-title").textContent = answer.welcome ? "Try one of these" : "";
  if (answer.welcome) $("status").textContent = "";
  else if (answer.browsing) $("status").textContent = `${answer.total.toLocaleString("en")} sounds` + (answer.total > hits.length ? `, the first ${hits.length}` : "");
  else $("status").textContent = `${hits.length} sounds like ${described()} in ${Math.round(answer.timing_ms?.total ?? 0)} ms`
    + (answer.partial ? `; parts of the index did not answer: ${answer.missing.join(", ")}` : "");
  if (hits.length) results.show(hits, state);
  else results.empty(Object.keys(state.filter).length || state.area ? "Nothing here: loosen the filters." : "Nothing found.");
  map.highlight(address.hasQuery(state) ? hits : []);
  chips();
}

function fail(error) {
  asked = "";
  results.empty("");
  document.body.classList.remove("welcome", "browsing");
  $("status").textContent = "";
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

function described() {
  if (state.text) return `“${state.text}”`;
  if (state.item) return names.get(state.item) ?? "this";
  if (state.upload) return $("query-name").textContent || "yours";
  return "the examples";
}

async function showQuery() {
  if (state.upload) {
    const upload = await uploads.find(state.upload);
    if (!upload) return query.hide();
    upload.url ??= URL.createObjectURL(upload.blob);
    return query.show({ key: state.upload, name: upload.name, url: upload.url, bytes: () => upload.blob.arrayBuffer() }, state.from, state.to);
  }
  if (!state.item) return query.hide();
  const key = state.item;
  const item = await ask(`items/${key}`).catch(() => null);
  if (!item || state.item !== key) return;
  names.set(key, item.uri);
  const url = `items/${key}/audio?format=wav`;
  query.show({ key, name: item.uri, url, offset: item.start_s, bytes: async () => (await fetch(url)).arrayBuffer() }, state.from, state.to);
}

async function showMap() {
  const shown = state.view === "map";
  $("map").hidden = !shown;
  if (!shown && !state.area) return;
  const wanted = state.colour || facets.columns().find((facet) => facet.type === "text")?.column || "";
  map.columns(facets.columns().filter((facet) => facet.type !== "number" || facet.distinct <= 20).map((facet) => facet.column), wanted);
  try {
    if (showMap.colour !== wanted || !map.loaded()) { showMap.colour = wanted; await map.load(wanted); }
    map.setArea(state.area);
  } catch (error) {
    $("map-note").textContent = error.message;
  }
}

function chips() {
  const filters = Object.entries(state.filter).map(([column, condition]) => chip(facets.describe(column, condition), "drop this filter",
    () => go({ filter: facets.without(state.filter, column) })));
  if (state.area) filters.push(chip("an area of the map", "drop this filter", () => go({ area: null })));
  if (filters.length > 1) filters.push(chip("clear all", "drop all filters", () => go({ filter: {}, area: null })));
  $("chips").replaceChildren(...filters);
  $("chips").hidden = !filters.length;
  const steering = [["plus", "+", "like"], ["minus", "−", "not like"]].flatMap(([list, sign, word]) => state[list].map((id) => {
    const button = chip(`${sign} ${names.get(id) ?? id}`, `${word} this: remove`, () => go({ [list]: state[list].filter((one) => one !== id) }));
    button.classList.toggle("minus-chip", list === "minus");
    return button;
  }));
  $("examples-row").replaceChildren(...steering);
  $("examples-row").hidden = !steering.length;
}

function chip(text, title, remove) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", title });
  button.textContent = `${text} ✕`;
  button.addEventListener("click", remove);
  return button;
}

// --- what a person does --------------------------------------------------------------------------------------------

async function askWith(blob, name) {
  const key = await uploads.keep(blob, name);
  go({ ...fresh, upload: key });
}

function steer(list, hit) {
  const other = list === "plus" ? "minus" : "plus";
  const has = state[list].includes(hit.key);
  go({ [list]: has ? state[list].filter((id) => id !== hit.key) : [...state[list], hit.key], [other]: state[other].filter((id) => id !== hit.key) });
}

const similar = (hit) => { names.set(hit.key, hit.uri); go({ ...fresh, item: hit.key }); scrollTo({ top: 0, behavior: "smooth" }); };
results.on({
  similar,
  plus: (hit) => steer("plus", hit),
  minus: (hit) => steer("minus", hit),
  only: (column, value) => go({ filter: { ...state.filter, [column]: value } }),
});
facets.onChange((filter) => go({ filter }));
query.onRegion((region) => go(region ? { from: region[0], to: region[1] } : { from: null, to: null }));
map.on({
  area: (area) => go({ area }),
  colour: (colour) => go({ colour }),
  name: async (id) => names.get(id) ?? ask(`items/${id}`).then((item) => { names.set(id, item.uri); return item.uri; }),
  pick: async (id) => {
    const item = { ...(await ask(`items/${id}`)), key: id };
    names.set(id, item.uri);
    player.play(results.playable(item));
  },
});
player.onMove(results.move);

$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) askWith(file, file.name);
});
$("record").addEventListener("click", () => record.toggle((blob) => askWith(blob, "recording"), (text) => fail(new Error(text))));
$("words").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text) go({ ...fresh, text });
});
$("parts").addEventListener("change", () => go({ part: $("parts").checked }));
$("query-close").addEventListener("click", () => go(fresh));
$("home").addEventListener("click", (event) => { event.preventDefault(); go({ ...fresh, filter: {}, view: "list" }); });
for (const name of ["list", "map"]) $(`view-${name}`).addEventListener("click", () => go({ view: name }));
$("filters-open").addEventListener("click", () => {
  const open = $("facets").classList.toggle("open");
  $("filters-open").setAttribute("aria-expanded", String(open));
});
$("help-open").addEventListener("click", () => $("help").showModal());
addEventListener("popstate", () => { state = address.read(); render(); });

let over = 0;
const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => { if (carriesFile(event)) { over++; $("veil").hidden = false; } });
addEventListener("dragleave", (event) => { if (carriesFile(event)) { over = Math.max(0, over - 1); $("veil").hidden = over === 0; } });
addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  over = 0;
  $("veil").hidden = true;
  const [file] = event.dataTransfer.files;
  if (file) askWith(file, file.name);
});

const KEYS = {
  "/": () => ($("words").hidden ? $("file") : $("text")).focus(),
  ArrowDown: () => results.move(1),
  ArrowUp: () => results.move(-1),
  j: () => results.move(1),
  k: () => results.move(-1),
  " ": () => { const hit = results.current(); player.toggle(hit ? results.playable(hit) : undefined); },
  ArrowLeft: () => player.nudge(-1),
  ArrowRight: () => player.nudge(1),
  m: () => { const hit = results.current(); if (hit) similar(hit); },
  "+": () => { const hit = results.current(); if (hit) steer("plus", hit); },
  "=": () => KEYS["+"](),
  "-": () => { const hit = results.current(); if (hit) steer("minus", hit); },
  v: () => go({ view: state.view === "map" ? "list" : "map" }),
  "?": () => $("help").showModal(),
  Escape: () => { if (state.to !== null) go({ from: null, to: null }); else if (address.hasQuery(state)) go(fresh); },
};
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox]):not([type=file]), select, textarea");
  const onButton = event.key === " " && event.target.matches("button, a, input, [role=button]");
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open || onButton) return;
  if (typing && event.key !== "Escape") return;
  const act = KEYS[event.key];
  if (!act) return;
  if (event.key !== "Escape") event.preventDefault();
  else event.target.blur();
  act();
});

// --- start ---------------------------------------------------------------------------------------------------------

async function start() {
  try {
    release = await ask("release");
    const minutes = release.hours * 60;
    const length = minutes >= 90 ? `${release.hours.toFixed(1)} hours` : minutes >= 1.5 ? `${Math.round(minutes)} minutes` : `${Math.round(minutes * 60)} seconds`;
    $("release").textContent = `${release.sounds.toLocaleString("en")} sounds · ${length}`;
    $("release").title = `release ${release.version}, ${release.rows.toLocaleString("en")} windows`;
    $("words").hidden = !release.text;
    await facets.load();
  } catch (error) {
    $("release").textContent = "not ready";
    return fail(new Error(`The service is not ready: ${error.message}. Reload in a moment.`));
  }
  render();
}
start();
