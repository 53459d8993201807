// The sound that is asked with: its waveform over its spectrogram; click to listen from there, drag to search a part.

import * as player from "./player.js";
import { decode, drawPeaks, drawSpectrogram, peaksOf, seconds } from "./sound.js";

const $ = (id) => document.getElementById(id);
const SHORTEST_S = 0.1, STEP_S = 0.1;
let sound = null; // { key, name, url, offset, duration, samples, sampleRate }
let region = null, draft = null, at = 0;
let chosen = () => {};

export const onRegion = (handler) => { chosen = handler; };

// offset: where the shown audio begins in its file, so that regions are in seconds of the file
export async function show({ key, name, url, bytes, offset = 0 }, from, to) {
  $("query").hidden = false;
  $("query-name").textContent = name;
  region = to === null ? null : [from ?? 0, to];
  if (sound?.key === key) return place();
  sound = { key, name, url, offset, duration: 0, samples: null };
  const mine = sound;
  $("scope").hidden = true;
  try {
    const decoded = await decode(await bytes());
    if (mine !== sound) return;
    Object.assign(mine, decoded);
    $("scope").hidden = false;
    redraw();
  } catch { /* a format that this browser cannot decode; the service can */ }
  place();
}

export function hide() {
  $("query").hidden = true;
  sound = region = null;
}

export function redraw() {
  if (!sound?.samples) return;
  drawPeaks($("wave"), peaksOf(sound.samples, Math.max(60, Math.floor($("wave").clientWidth / 3))));
  drawSpectrogram($("spectrogram"), sound.samples, sound.sampleRate);
  place();
}

function place() {
  const shown = draft ?? region, whole = sound?.duration || 1;
  $("selection").hidden = !shown || !sound?.samples;
  $("whole").hidden = !region;
  $("query-region").textContent = shown && sound ? `${seconds(shown[0])} to ${seconds(shown[1])}` : sound?.duration ? seconds(sound.duration) : "";
  if (shown && sound) {
    $("selection").style.left = `${((shown[0] - sound.offset) / whole) * 100}%`;
    $("selection").style.width = `${((shown[1] - shown[0]) / whole) * 100}%`;
  }
  $("scope").setAttribute("aria-valuemax", whole.toFixed(1));
  $("scope").setAttribute("aria-valuenow", at.toFixed(1));
  $("scope").setAttribute("aria-valuetext", seconds(at) + (shown ? `, part ${seconds(shown[0])} to ${seconds(shown[1])}` : ""));
}

const second = (event) => {
  const box = $("scope").getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * sound.duration;
};

const playable = () => ({ key: "query", name: sound.name, url: sound.url });

$("scope").addEventListener("pointerdown", (event) => {
  if (!sound?.samples || event.button !== 0) return;
  const began = second(event), scope = $("scope");
  scope.setPointerCapture(event.pointerId);
  const drag = (next) => {
    const here = second(next);
    draft = Math.abs(here - began) >= SHORTEST_S
      ? [Math.min(began, here) + sound.offset, Math.max(began, here) + sound.offset] : null;
    place();
  };
  const end = () => {
    scope.removeEventListener("pointermove", drag);
    const picked = draft;
    draft = null;
    if (picked) { region = picked; place(); chosen(picked); } else player.play(playable(), began);
  };
  scope.addEventListener("pointermove", drag);
  scope.addEventListener("pointerup", end, { once: true });
  scope.addEventListener("pointercancel", () => { scope.removeEventListener("pointermove", drag); draft = null; place(); }, { once: true });
});

$("scope").addEventListener("keydown", (event) => {
  if (!sound?.samples) return;
  const step = { ArrowLeft: -STEP_S, ArrowRight: STEP_S }[event.key];
  if (step && event.shiftKey) {
    const [start, end] = draft ?? [at + sound.offset, at + sound.offset];
    draft = [start, Math.min(sound.offset + sound.duration, Math.max(start, end + step))];
  } else if (step) at = Math.min(sound.duration, Math.max(0, at + step));
  else if (event.key === "Enter" && draft && draft[1] - draft[0] >= SHORTEST_S) { region = draft; draft = null; chosen(region); }
  else if (event.key === "Escape" && draft) draft = null;
  else return;
  event.preventDefault();
  event.stopPropagation();
  place();
});
$("query-play").addEventListener("click", () => sound && player.toggle({ ...playable(), at: region ? region[0] - sound.offset : 0 }));
$("whole").addEventListener("click", () => { region = null; place(); chosen(null); });

player.watch((current, audio) => {
  const mine = current?.key === "query";
  $("query-play").textContent = mine && !audio.paused ? "⏸" : "▶";
  $("query-play").setAttribute("aria-label", mine && !audio.paused ? "Pause your sound" : "Play your sound");
  $("cursor").hidden = !mine || !sound?.duration;
  if (mine && sound?.duration) $("cursor").style.left = `${(audio.currentTime / sound.duration) * 100}%`;
});
addEventListener("resize", () => redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
