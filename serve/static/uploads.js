// Sounds that were dropped, chosen or recorded, kept by this browser so that Back and a reload find them again.

const STORE = "sounds", KEPT = 20;
const here = new Map();

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("sounds-like-this", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function run(database, mode, work) {
  return new Promise((resolve, reject) => {
    const store = database.transaction(STORE, mode).objectStore(STORE);
    const request = work(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function keep(blob, name) {
  const key = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  here.set(key, { blob, name });
  try {
    const database = await open();
    await run(database, "readwrite", (store) => store.put({ blob, name }, key));
    const keys = await run(database, "readonly", (store) => store.getAllKeys());
    for (const old of keys.sort().slice(0, -KEPT)) await run(database, "readwrite", (store) => store.delete(old));
  } catch { /* a private window: the sound lasts as long as the page */ }
  return key;
}

export async function find(key) {
  if (here.has(key)) return here.get(key);
  try {
    const found = await run(await open(), "readonly", (store) => store.get(key));
    if (found) here.set(key, found);
    return found ?? null;
  } catch {
    return null;
  }
}
