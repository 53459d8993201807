// Filters built from the items' own columns, with counts: tick what is wanted, no query language.

import { ask } from "./api.js";

const $ = (id) => document.getElementById(id);
const MOST_VALUES = 40;
let changed = () => {};
let known = [];

export const onChange = (handler) => { changed = handler; };

export async function load() {
  const answer = await ask(`facets?limit=${MOST_VALUES}`);
  known = answer.facets.filter((facet) => facet.distinct > 1 && (facet.type === "number" || facet.distinct <= MOST_VALUES));
  return known;
}

export const columns = () => known;

export function render(filter) {
  $("facets").replaceChildren(...known.map((facet) => (ranged(facet) ? range(facet, filter) : values(facet, filter))));
  $("stage").classList.toggle("alone", known.length === 0);
  $("filters-open").hidden = known.length === 0;
}

const ranged = (facet) => facet.type === "number" && facet.distinct > 12;

function fieldset(facet) {
  const set = document.createElement("fieldset"), legend = document.createElement("legend");
  legend.textContent = facet.column;
  set.append(legend);
  return set;
}

function values(facet, filter) {
  const set = fieldset(facet), chosen = wanted(filter[facet.column]);
  for (const { value, count } of facet.values) {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.checked = chosen.includes(value);
    box.addEventListener("change", () => {
      const now = box.checked ? [...chosen, value] : chosen.filter((one) => one !== value);
      changed({ ...without(filter, facet.column), ...(now.length ? { [facet.column]: now.length === 1 ? now[0] : { in: now } } : {}) });
    });
    const name = document.createElement("span"), number = document.createElement("span");
    name.textContent = value === null ? "(none)" : String(value);
    number.textContent = count.toLocaleString("en");
    number.className = "quiet";
    label.append(box, name, " ", number);
    set.append(label);
  }
  return set;
}

function range(facet, filter) {
  const set = fieldset(facet), box = document.createElement("div"), given = filter[facet.column] ?? {};
  box.className = "range";
  for (const [sign, hint, start] of [["gte", "from", facet.min], ["lte", "to", facet.max]]) {
    const input = document.createElement("input");
    Object.assign(input, { type: "number", step: "any", placeholder: String(start), value: given[sign] ?? "" });
    input.setAttribute("aria-label", `${facet.column} ${hint}`);
    input.addEventListener("change", () => {
      const now = { ...given };
      if (input.value === "") delete now[sign]; else now[sign] = Number(input.value);
      changed({ ...without(filter, facet.column), ...(Object.keys(now).length ? { [facet.column]: now } : {}) });
    });
    box.append(input);
  }
  set.append(box);
  return set;
}

export const without = (filter, column) => Object.fromEntries(Object.entries(filter).filter(([name]) => name !== column));

export function wanted(condition) {
  if (condition === undefined) return [];
  if (condition !== null && typeof condition === "object") return Array.isArray(condition.in) ? condition.in : [];
  return [condition];
}

export function describe(column, condition) {
  const values = wanted(condition);
  if (values.length) return `${column}: ${values.map((value) => value ?? "(none)").join(" or ")}`;
  const words = { gte: "≥", lte: "≤", gt: ">", lt: "<", ne: "is not", contains: "contains" };
  return `${column} ${Object.entries(condition ?? {}).map(([sign, value]) => `${words[sign] ?? sign} ${value}`).join(" and ")}`;
}
