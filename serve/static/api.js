// Asking the service. A search that a newer one has overtaken is dropped, never shown.

const idOf = (thing) => thing.links.item.split("/").pop();

export async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service does not answer; is it running?", { cause: error });
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const wait = response.headers.get("Retry-After");
  const error = new Error((body.detail || `${response.status} ${response.statusText}`) + (wait ? ` (try again in ${wait} s)` : ""));
  error.code = body.code;
  throw error;
}

// Calls of the returned function abort the one before; only the last one's promise ever resolves.
export function latest(work) {
  let running = null;
  return async (...args) => {
    running?.abort();
    const mine = new AbortController();
    running = mine;
    try {
      const answer = await work(mine.signal, ...args);
      return mine === running ? { answer } : { stale: true };
    } catch (error) {
      if (mine !== running || error.name === "AbortError") return { stale: true };
      return { error };
    }
  };
}

export const withIds = (things) => things.map((thing) => ({ ...thing, key: idOf(thing) }));

// Filters are sent as text, since ids in them are longer than a JavaScript number.
export function filterText(filter, ids = null) {
  const parts = Object.entries(filter).map(([column, condition]) => `${JSON.stringify(column)}:${JSON.stringify(condition)}`);
  if (ids) parts.push(`"id":{"in":[${ids.join(",")}]}`);
  return parts.length ? `{${parts.join(",")}}` : "";
}

const json = (text, signal) => ({ method: "POST", body: text, headers: { "Content-Type": "application/json" }, signal });

export function search(state, upload, k, ids, signal) {
  const filter = filterText(state.filter, ids);
  const include = state.plus.map((id) => ({ id })), exclude = state.minus.map((id) => ({ id }));
  if (state.upload) {
    const form = new FormData();
    form.append("file", upload.blob, upload.name);
    form.append("k", k);
    if (state.part) form.append("mode", "windows");
    if (filter) form.append("filter", filter);
    if (state.from !== null) form.append("start_s", state.from);
    if (state.to !== null) form.append("end_s", state.to);
    if (include.length || exclude.length) form.append("examples", JSON.stringify({ include, exclude }));
    return ask("search", { method: "POST", body: form, signal });
  }
  if (state.text && !include.length && !exclude.length) {
    return ask("search/text", json(`{"text":${JSON.stringify(state.text)},"k":${k},"filter":${filter || "null"}}`, signal));
  }
  if (state.item && !include.length && !exclude.length) {
    const options = new URLSearchParams({ k });
    if (filter) options.set("filter", filter);
    if (state.from !== null) options.set("start_s", state.from);
    if (state.to !== null) options.set("end_s", state.to);
    return ask(`search/id/${state.item}?${options}`, { signal });
  }
  if (state.item) include.unshift({ id: state.item, ...(state.to === null ? {} : { start_s: state.from ?? 0, end_s: state.to }) });
  const text = state.text ? `"text":${JSON.stringify(state.text)},` : "";
  return ask("search/examples", json(`{"examples":${JSON.stringify({ include, exclude })},${text}"k":${k},"filter":${filter || "null"}}`, signal));
}

export function browse(state, limit, ids, signal) {
  const options = new URLSearchParams({ limit });
  const filter = filterText(state.filter, ids);
  if (filter) options.set("filter", filter);
  return ask(`items?${options}`, { signal });
}
