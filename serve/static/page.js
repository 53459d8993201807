// The page: ask by file, microphone, words or a hit; show and play what comes back.
// Ids are 63-bit, more than a JavaScript number holds, so only the links in the answers are used.

import { drawSpectrogram } from "./spectrogram.js";

const $ = (id) => document.getElementById(id);
let lastSearch = null; // repeated when an option changes

async function ask(url, options) {
  const response = await fetch(url, options);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `${response.status} ${response.statusText}`);
  return body;
}

async function run(name, search) {
  lastSearch = () => run(name, search);
  $("problem").hidden = true;
  $("status").textContent = "searching…";
  document.body.ariaBusy = "true";
  try {
    const answer = await search();
    show(name, answer);
  } catch (error) {
    $("results").replaceChildren();
    $("status").textContent = "";
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  } finally {
    document.body.ariaBusy = "false";
  }
}

function searchFile(blob, name) {
  showQuery(blob, name);
  return run(name, () => {
    const form = new FormData();
    form.append("file", blob, name);
    form.append("k", $("k").value);
    form.append("mode", $("mode").value);
    if ($("filter").value.trim()) form.append("filter", $("filter").value);
    return ask("search", { method: "POST", body: form });
  });
}

function searchText(text) {
  $("query").hidden = true;
  return run(`“${text}”`, () => {
    const filter = $("filter").value.trim() ? JSON.parse($("filter").value) : null;
    const body = JSON.stringify({ text, k: Number($("k").value), filter });
    return ask("search/text", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  });
}

function searchSimilar(hit) {
  $("query").hidden = true;
  return run(`more like ${hit.uri}`, () => {
    const options = new URLSearchParams({ k: $("k").value });
    if ($("filter").value.trim()) options.set("filter", $("filter").value);
    return ask(`${hit.links.similar}?${options}`);
  });
}

async function showQuery(blob, name) {
  $("query").hidden = false;
  $("query-name").textContent = name;
  URL.revokeObjectURL($("query-audio").src);
  $("query-audio").src = URL.createObjectURL(blob);
  $("query-picture").hidden = true;
  try {
    await drawSpectrogram($("query-picture"), await blob.arrayBuffer());
    $("query-picture").hidden = false;
  } catch { /* a format that this browser cannot decode; the service can */ }
}

function show(name, answer) {
  const t = answer.timing_ms;
  $("status").textContent = `${answer.results.length} hits for ${name} in ${t.total.toFixed(0)} ms `
    + `(decode ${t.decode.toFixed(0)}, encode ${t.encode.toFixed(0)}, search ${t.search.toFixed(0)})`;
  $("results").replaceChildren(...answer.results.map(card));
}

function card(hit) {
  const node = $("hit").content.cloneNode(true).firstElementChild;
  const part = (selector) => node.querySelector(selector);
  part("img").src = hit.links.spectrogram;
  part("img").alt = `Spectrogram of ${hit.uri}`;
  part(".name").textContent = hit.uri;
  part(".where").textContent = `${hit.start_s.toFixed(1)} to ${hit.end_s.toFixed(1)} s`
    + (hit.query_start_s === null ? "" : `, like yours at ${hit.query_start_s.toFixed(1)} s`);
  part("meter").value = Math.max(0, hit.score);
  part(".score").textContent = hit.score.toFixed(3);
  part(".chips").append(...Object.entries(hit.item).filter(([, value]) => value !== null).map(chip));
  part(".similar").addEventListener("click", () => searchSimilar(hit));
  const audio = part("audio");
  audio.src = `${hit.links.audio}#t=${hit.start_s},${hit.end_s}`;
  audio.addEventListener("error", () => { audio.src = `${hit.links.audio}?format=wav`; }, { once: true });
  return node;
}

function chip([column, value]) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = `${column}: ${value}`;
  button.title = "only these";
  button.addEventListener("click", () => {
    $("filter").value = JSON.stringify({ [column]: value });
    lastSearch?.();
  });
  return button;
}

let recorder = null;
let clock = null;
async function toggleRecording() {
  if (recorder) { recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    $("problem").textContent = `no microphone: ${error.message}`;
    $("problem").hidden = false;
    return;
  }
  const pieces = [];
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.addEventListener("stop", () => {
    stream.getTracks().forEach((track) => track.stop());
    clearInterval(clock);
    const type = recorder.mimeType;
    recorder = null;
    $("record").setAttribute("aria-pressed", "false");
    $("record").textContent = "● Record";
    searchFile(new Blob(pieces, { type }), "recording");
  });
  recorder.start();
  const began = performance.now();
  const tick = () => {
    $("record").textContent = `■ Stop and search (${Math.floor((performance.now() - began) / 1000)} s)`;
  };
  clock = setInterval(tick, 250);
  tick();
  $("record").setAttribute("aria-pressed", "true");
}

async function describeRelease() {
  try {
    const release = await ask("release");
    $("release").textContent = `release ${release.version}: ${release.rows.toLocaleString("en")} items`;
    $("text").disabled = $("go").disabled = !release.text;
    if (!release.text) $("text-reason").textContent = `No search by words: ${release.text_reason}.`;
  } catch (error) {
    $("release").textContent = `not ready: ${error.message}`;
  }
}

$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) searchFile(file, file.name);
});
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) searchFile(file, file.name);
});
$("record").addEventListener("click", toggleRecording);
$("words").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text) searchText(text);
});
["k", "mode", "filter"].forEach((id) => $(id).addEventListener("change", () => lastSearch?.()));
describeRelease();
