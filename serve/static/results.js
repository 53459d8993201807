// Rows of sounds: the matched moment on each one's own waveform, a quiet bar for the score, and what to do with it.

import * as player from "./player.js";
import { drawPeaks, seconds } from "./sound.js";

const $ = (id) => document.getElementById(id);
let shown = []; // [{ hit, node }], in the order of the list
let at = -1;
let handlers = {};

export const on = (given) => { handlers = given; };
export const current = () => shown[at]?.hit ?? null;

export function loading(rows) {
  if (shown.length) return; // what was found before stays until there is something better
  $("results").replaceChildren(...Array.from({ length: rows }, () => Object.assign(document.createElement("li"), { className: "skeleton" })));
}

export function empty(text) {
  shown = [];
  at = -1;
  const note = Object.assign(document.createElement("li"), { className: "empty", textContent: text });
  $("results").replaceChildren(...(text ? [note] : []));
}

export function show(hits, steering) {
  shown = hits.map((hit) => ({ hit, node: row(hit, steering) }));
  at = -1;
  $("results").replaceChildren(...shown.map(({ node }) => node));
  for (const { node } of shown) visible.observe(node);
}

export function move(by, listen = false) {
  if (!shown.length) return;
  select(Math.min(shown.length - 1, Math.max(0, at + by)));
  if (listen) player.play(playable(shown[at].hit));
}

export function select(place, focus = true) {
  shown[at]?.node.classList.remove("current");
  at = place;
  const { node } = shown[at];
  node.classList.add("current");
  if (focus) node.focus({ preventScroll: true });
  node.scrollIntoView({ block: "nearest" });
}

export function playable(hit, span = best(hit)) {
  return { key: hit.key, name: hit.uri, url: hit.links.audio, fallback: `${hit.links.audio}?format=wav`, at: span.start_s };
}

export const best = (hit) => hit.matches?.spans?.[0] ?? hit;

function row(hit, steering) {
  const node = $("sound").content.cloneNode(true).firstElementChild;
  const part = (selector) => node.querySelector(selector);
  const place = () => shown.findIndex((one) => one.node === node);
  node.dataset.key = hit.key;
  node.setAttribute("aria-label", hit.uri);
  part(".name").textContent = hit.uri;
  part(".listen").setAttribute("aria-label", `Play ${hit.uri}`);
  part(".listen").addEventListener("click", () => { select(place(), false); player.toggle(playable(hit)); });
  part(".where").append(...moments(hit));
  part(".labels").append(...labels(hit));
  score(hit, part);
  part(".similar").addEventListener("click", () => handlers.similar(hit));
  for (const sign of ["plus", "minus"]) {
    const button = part(`.${sign}`);
    button.setAttribute("aria-label", sign === "plus" ? `Like ${hit.uri} too` : `Not like ${hit.uri}`);
    button.setAttribute("aria-pressed", String(steering[sign].includes(hit.key)));
    button.addEventListener("click", () => handlers[sign](hit));
  }
  part(".picture").addEventListener("click", (event) => {
    const peaks = node.peaks;
    const share = event.offsetX / Math.max(1, part(".picture").clientWidth);
    select(place(), false);
    player.play(playable(hit), peaks ? peaks.start_s + share * (peaks.end_s - peaks.start_s) : best(hit).start_s);
  });
  return node;
}

function score(hit, part) {
  if (hit.score === undefined) return;
  const meter = part("meter"), chance = hit.probability;
  meter.value = Math.max(0, chance ?? hit.score);
  meter.setAttribute("aria-label", chance === null || chance === undefined ? "Similarity" : "Chance of a match");
  part(".score").textContent = chance === null || chance === undefined ? hit.score.toFixed(3) : `${Math.round(chance * 100)}% likely`;
  part(".score").title = `cosine similarity ${hit.score.toFixed(4)}`;
}

function moments(hit) {
  const spans = hit.matches?.spans?.length ? hit.matches.spans : [hit];
  const buttons = spans.slice(0, 4).map((span) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "plain chip" });
    button.textContent = `${seconds(span.start_s)} – ${seconds(span.end_s)}`;
    button.title = span.query_start_s === null || span.query_start_s === undefined ? "play this moment"
      : `like yours at ${seconds(span.query_start_s)}`;
    button.setAttribute("aria-label", `Play ${hit.uri} from ${seconds(span.start_s)}`);
    button.addEventListener("click", () => player.play(playable(hit, span)));
    return button;
  });
  const more = spans.length - buttons.length;
  return more > 0 ? [...buttons, ` and ${more} more moments`] : buttons;
}

function labels(hit) {
  return Object.entries(hit.item ?? {}).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value)).slice(0, 4)
    .map(([column, value]) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.textContent = `${column}: ${value}`;
      button.title = "only these";
      button.addEventListener("click", () => handlers.only(column, value));
      return button;
    });
}

const visible = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    visible.unobserve(entry.target);
    const hit = shown.find(({ node }) => node === entry.target)?.hit;
    if (hit) picture(entry.target, hit);
  }
}, { rootMargin: "300px" });

async function picture(node, hit) {
  try {
    const response = await fetch(`${hit.links.item}/waveform`);
    if (!response.ok) return;
    node.peaks = await response.json();
    paint(node, hit);
  } catch { /* the row is of use without its picture */ }
}

function paint(node, hit) {
  const { peaks, start_s: from, end_s: to } = node.peaks;
  const spans = hit.matches?.spans?.length ? hit.matches.spans : [hit];
  const marks = hit.score === undefined ? [] : spans.map((span) => [span.start_s, span.end_s]);
  drawPeaks(node.querySelector(".peaks"), peaks, { from, to, marks });
}

export const redraw = () => shown.filter(({ node }) => node.peaks).forEach(({ node, hit }) => paint(node, hit));
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

player.watch((now, audio) => {
  for (const { hit, node } of shown) {
    const mine = now?.key === hit.key && !audio.paused, button = node.querySelector(".listen");
    button.textContent = mine ? "⏸" : "▶";
    button.setAttribute("aria-label", `${mine ? "Pause" : "Play"} ${hit.uri}`);
  }
});
