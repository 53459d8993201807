// The one player: plays a sound from a moment on, says where it is, moves to the next.

const $ = (id) => document.getElementById(id);
const audio = new Audio();
audio.preload = "none";
let current = null; // { key, name, url, fallback, at, until }
const watchers = new Set();
let move = () => {};

const tell = () => watchers.forEach((watcher) => watcher(current, audio));

export const watch = (watcher) => watchers.add(watcher);
export const onMove = (mover) => { move = mover; };

export async function play(sound, at = sound.at ?? 0) {
  const same = current?.key === sound.key && current.url === sound.url;
  current = { ...sound };
  $("player").hidden = false;
  $("now-name").textContent = sound.name;
  if (!same) audio.src = sound.url;
  seekWhenReady(at);
  try {
    await audio.play();
  } catch (error) {
    if (error.name === "AbortError" || !current?.fallback || current.key !== sound.key) return tell();
    // a format that this browser cannot play: the service's own decoding of the matched part
    const fallback = current.fallback;
    current = { ...current, url: fallback, fallback: null, offset: sound.at ?? 0 };
    audio.src = fallback;
    audio.play().catch(tell);
  }
  tell();
}

function seekWhenReady(at) {
  if (audio.readyState >= 1) { audio.currentTime = at; return; }
  audio.addEventListener("loadedmetadata", () => { if (at > 0) audio.currentTime = at; }, { once: true });
}

export function toggle(sound = current) {
  if (!sound) return;
  if (current?.key === sound.key && !audio.paused) audio.pause();
  else if (current?.key === sound.key && audio.currentTime > 0 && !audio.ended) audio.play().catch(tell);
  else play(sound);
}

export function nudge(by) {
  if (current) audio.currentTime = Math.max(0, audio.currentTime + by);
}

const clock = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;

for (const event of ["play", "pause", "ended", "timeupdate", "loadedmetadata"]) audio.addEventListener(event, () => {
  const length = Number.isFinite(audio.duration) ? audio.duration : 0;
  $("play").textContent = audio.paused ? "▶" : "⏸";
  $("play").setAttribute("aria-label", audio.paused ? "Play" : "Pause");
  $("seek").max = String(length || 1);
  $("seek").value = String(audio.currentTime);
  $("seek").setAttribute("aria-valuetext", `${clock(audio.currentTime)} of ${clock(length)}`);
  $("clock").textContent = `${clock(audio.currentTime)} / ${clock(length)}`;
  tell();
});
$("play").addEventListener("click", () => toggle());
$("previous").addEventListener("click", () => move(-1, true));
$("next").addEventListener("click", () => move(1, true));
$("seek").addEventListener("input", () => { audio.currentTime = Number($("seek").value); });
