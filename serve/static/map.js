// All sounds as points: those that are alike lie together. Drag to move, wheel to zoom, click to hear, brush to filter.

import { ask } from "./api.js";
import { fit } from "./sound.js";

const $ = (id) => document.getElementById(id);
const SIZE = 65535, GRAY = "#8b97a5", REACH = 12;
const PALETTE = ["#0e7c86", "#d1495b", "#edae49", "#30638e", "#7b4fa3", "#5aa469", "#e07a3f", "#3d9bd9", "#b5548b", "#8a9a2b",
  "#17a398", "#c03fae", "#996633", "#5566cc", "#d98a8a", "#4b7f52", "#a88be0", "#c9a227", "#6d7b8a", "#e05c9d"];
let points = null; // { x, y, id, code, values, numeric }
let view = { x: 0, y: 0, zoom: 1 };
let area = null, lit = new Map(), brushing = false, draft = null, hovered = -1;
let handlers = {};

export const on = (given) => { handlers = given; };
export const loaded = () => points !== null;

export async function load(colour) {
  const options = new URLSearchParams(colour ? { colour } : {});
  points = await ask(`map?${options}`);
  $("map-note").textContent = points.shown < points.total
    ? `${points.shown.toLocaleString("en")} of ${points.total.toLocaleString("en")} sounds` : "";
  legend();
  draw();
}

export function columns(names, chosen) {
  $("map-column").replaceChildren(...["", ...names].map((name) => new Option(name || "nothing", name, false, name === chosen)));
}

export function highlight(hits) {
  lit = new Map(hits.map((hit, rank) => [hit.key, rank]));
  draw();
}

export function setArea(given) {
  area = given;
  draw();
}

export function idsIn([x0, y0, x1, y1], most) {
  const found = [];
  for (let i = 0; i < points.x.length && found.length < most; i++) {
    if (points.x[i] >= x0 && points.x[i] <= x1 && points.y[i] >= y0 && points.y[i] <= y1) found.push(points.id[i]);
  }
  return found;
}

const colourOf = (code) => (code < 0 ? GRAY : PALETTE[code % PALETTE.length]);

function legend() {
  $("map-legend").replaceChildren(...points.values.slice(0, PALETTE.length).map((value, code) => {
    const item = document.createElement("li"), dot = document.createElement("i");
    dot.style.background = colourOf(code);
    item.append(dot, String(value));
    return item;
  }));
}

function frame() {
  const canvas = $("map-canvas"), scale = (Math.min(canvas.width, canvas.height) / SIZE) * view.zoom * 0.94;
  return { canvas, scale, left: canvas.width / 2 - (SIZE / 2 + view.x) * scale, top: canvas.height / 2 - (SIZE / 2 + view.y) * scale };
}

let asked = false;
export function draw() {
  if (asked || !points || $("map").hidden) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; paint(); });
}

function paint() {
  const drawing = fit($("map-canvas")), { canvas, scale, left, top } = frame();
  const size = Math.max(2, Math.min(9, (1 + Math.log2(view.zoom + 1)) * (points.x.length > 20000 ? 1.2 : 2.4))) * (devicePixelRatio > 1 ? 1.5 : 1);
  drawing.clearRect(0, 0, canvas.width, canvas.height);
  const byColour = new Map();
  for (let i = 0; i < points.x.length; i++) {
    const x = left + points.x[i] * scale, y = top + points.y[i] * scale;
    if (x < -size || y < -size || x > canvas.width + size || y > canvas.height + size) continue;
    const code = points.code[i];
    if (!byColour.has(code)) byColour.set(code, []);
    byColour.get(code).push(x, y);
  }
  drawing.globalAlpha = lit.size ? 0.35 : 0.8;
  for (const [code, places] of byColour) {
    drawing.fillStyle = colourOf(code);
    for (let i = 0; i < places.length; i += 2) drawing.fillRect(places[i] - size / 2, places[i + 1] - size / 2, size, size);
  }
  drawing.globalAlpha = 1;
  ring(drawing, left, top, scale, size);
  const box = draft ?? area;
  if (box) {
    drawing.strokeStyle = getComputedStyle(canvas).color;
    drawing.setLineDash([6, 4]);
    drawing.strokeRect(left + box[0] * scale, top + box[1] * scale, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale);
    drawing.setLineDash([]);
  }
}

function ring(drawing, left, top, scale, size) {
  drawing.lineWidth = 2;
  for (let i = 0; i < points.id.length; i++) {
    if (i !== hovered && !lit.has(points.id[i])) continue;
    drawing.beginPath();
    drawing.arc(left + points.x[i] * scale, top + points.y[i] * scale, size + 2, 0, 7);
    drawing.fillStyle = colourOf(points.code[i]);
    drawing.fill();
    drawing.strokeStyle = getComputedStyle($("map-canvas")).color;
    drawing.stroke();
  }
}

function spot(event) {
  const box = $("map-canvas").getBoundingClientRect(), ratio = $("map-canvas").width / box.width, { scale, left, top } = frame();
  const px = (event.clientX - box.left) * ratio, py = (event.clientY - box.top) * ratio;
  return { px, py, x: (px - left) / scale, y: (py - top) / scale, ratio, scale };
}

function nearest({ x, y, scale, ratio }) {
  let best = -1, least = ((REACH * ratio) / scale) ** 2;
  for (let i = 0; i < points.x.length; i++) {
    const distance = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
    if (distance < least) { least = distance; best = i; }
  }
  return best;
}

function zoom(by, event) {
  const before = event ? spot(event) : { x: SIZE / 2 + view.x, y: SIZE / 2 + view.y };
  view.zoom = Math.min(400, Math.max(1, view.zoom * by));
  if (event) {
    const after = spot(event);
    view.x += before.x - after.x;
    view.y += before.y - after.y;
  }
  draw();
}

const pointers = new Map();
let moved = false, pinch = 0;
$("map-canvas").addEventListener("pointerdown", (event) => {
  if (!points) return;
  $("map-canvas").setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, spot(event));
  moved = false;
});
$("map-canvas").addEventListener("pointermove", (event) => {
  if (!points) return;
  const here = spot(event), from = pointers.get(event.pointerId);
  if (!from) return hover(here, event);
  if (pointers.size === 2) {
    pointers.set(event.pointerId, here);
    const [a, b] = [...pointers.values()], span = Math.hypot(a.px - b.px, a.py - b.py);
    if (pinch) zoom(span / pinch, event);
    pinch = span;
    return;
  }
  moved ||= Math.hypot(here.px - from.px, here.py - from.py) > 4;
  if (!moved) return;
  if (brushing || event.shiftKey) {
    draft = [Math.min(from.x, here.x), Math.min(from.y, here.y), Math.max(from.x, here.x), Math.max(from.y, here.y)];
  } else {
    view.x += from.x - here.x;
    view.y += from.y - here.y;
  }
  draw();
});
for (const end of ["pointerup", "pointercancel"]) $("map-canvas").addEventListener(end, (event) => {
  const from = pointers.get(event.pointerId);
  pointers.delete(event.pointerId);
  pinch = 0;
  if (!from || end === "pointercancel") { draft = null; return; }
  if (draft) { const box = draft; draft = null; brush(false); handlers.area(box); return; }
  const hit = moved ? -1 : nearest(spot(event));
  if (hit >= 0) handlers.pick(points.id[hit]);
});
$("map-canvas").addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 400), event); }, { passive: false });
$("map-canvas").addEventListener("pointerleave", () => { hovered = -1; $("map-tip").hidden = true; draw(); });
$("map-canvas").addEventListener("keydown", (event) => {
  const step = SIZE / 12 / view.zoom;
  const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (move) { view.x += move[0]; view.y += move[1]; draw(); }
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "Enter") {
    const { scale } = frame(), hit = nearest({ x: SIZE / 2 + view.x, y: SIZE / 2 + view.y, scale, ratio: 8 });
    if (hit >= 0) handlers.pick(points.id[hit]);
  } else return;
  event.preventDefault();
  event.stopPropagation();
});

let tipFor = "";
async function hover(here, event) {
  const hit = nearest(here);
  if (hit === hovered) return;
  hovered = hit;
  draw();
  const tip = $("map-tip"), box = $("map").getBoundingClientRect();
  tip.hidden = hit < 0;
  if (hit < 0) return;
  const id = points.id[hit];
  tipFor = id;
  tip.textContent = points.values[points.code[hit]] ?? "…";
  tip.style.left = `${Math.min(event.clientX - box.left + 12, box.width - 180)}px`;
  tip.style.top = `${event.clientY - box.top + 12}px`;
  const name = await handlers.name(id).catch(() => null);
  if (name && tipFor === id) tip.textContent = name;
}

function brush(on) {
  brushing = on;
  $("map-brush").setAttribute("aria-pressed", String(on));
  $("map-canvas").classList.toggle("brushing", on);
}
$("map-brush").addEventListener("click", () => brush(!brushing));
$("map-reset").addEventListener("click", () => { view = { x: 0, y: 0, zoom: 1 }; handlers.area(null); draw(); });
$("map-column").addEventListener("change", () => handlers.colour($("map-column").value));
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
