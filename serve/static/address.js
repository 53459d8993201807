// What the page shows, as its address says it: every state can be bookmarked, and Back undoes one step.
//
//   text=words | item=ID | upload=KEY     what is asked with        from=, to=   only this part of it, in seconds
//   plus=ID,ID  minus=ID,ID               further examples          part=1       match any part
//   filter=JSON                           {"column": condition}     view=map  colour=COLUMN  area=x0,y0,x1,y1
//
// Ids are 63-bit and stay text: JavaScript numbers hold 53 bits.

const LISTS = ["plus", "minus"];

export function read(address = location.search) {
  const given = new URLSearchParams(address);
  const number = (name) => (given.has(name) && Number.isFinite(Number(given.get(name))) ? Number(given.get(name)) : null);
  const ids = (name) => (given.get(name) ?? "").split(",").filter((id) => /^\d{1,19}$/.test(id));
  let filter = {};
  try { filter = JSON.parse(given.get("filter") ?? "{}") ?? {}; } catch { /* an address typed by hand */ }
  const area = (given.get("area") ?? "").split(",").map(Number);
  return {
    text: given.get("text") ?? "",
    item: /^\d{1,19}$/.test(given.get("item") ?? "") ? given.get("item") : "",
    upload: given.get("upload") ?? "",
    from: number("from"),
    to: number("to"),
    part: given.get("part") === "1",
    filter: typeof filter === "object" && !Array.isArray(filter) ? filter : {},
    view: given.get("view") === "map" ? "map" : "list",
    colour: given.get("colour") ?? "",
    area: area.length === 4 && area.every(Number.isFinite) ? area : null,
    ...Object.fromEntries(LISTS.map((name) => [name, ids(name)])),
  };
}

export function write(state, replace = false) {
  const said = new URLSearchParams();
  for (const name of ["text", "item", "upload", "colour"]) if (state[name]) said.set(name, state[name]);
  for (const name of ["from", "to"]) if (state[name] !== null) said.set(name, String(Math.round(state[name] * 1000) / 1000));
  for (const name of LISTS) if (state[name].length) said.set(name, state[name].join(","));
  if (state.part) said.set("part", "1");
  if (Object.keys(state.filter).length) said.set("filter", JSON.stringify(state.filter));
  if (state.view === "map") said.set("view", "map");
  if (state.area) said.set("area", state.area.map((value) => Math.round(value)).join(","));
  const address = said.size ? `?${said}` : location.pathname;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}

export const hasQuery = (state) => Boolean(state.text || state.item || state.upload || state.plus.length || state.minus.length);
