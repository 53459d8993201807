"""A release served divided and undivided, side by side: what the shards cost a query.

    python benchmarks/serve_shards.py                       # generated vectors; starts both services and stops them
    python benchmarks/serve_shards.py --rows 1000000 --shards 4 --seconds 20

Both services of one release run at the same time, and requests go to one and the other in turn, so that whatever else
the machine does meets both. Prints p50, p95 and their ratios for one vector, for ten, with a filter, and for a clip.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _client import Client, post_file
from _service import ROOT, serve_run
from serve_load import post_json, sound

OUT = ROOT / "docs" / "benchmarks" / "serve_shards.json"
BAR = 2.0


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", help="an INDEX; default: one of generated vectors and an untrained encoder")
    parser.add_argument("--rows", type=int, default=200_000, help="of the generated index (default 200,000)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement (default 10)")
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        index = args.index or make_index(Path(work), args.rows)
        with serve_run(index) as undivided, serve_run(index, f"index_shards={args.shards}") as divided:
            report = uvloop.run(measure({"undivided": undivided, "divided": divided}, args.seconds))
    report |= {"rows": args.rows, "shards": args.shards, "cpus": os.cpu_count(), "load": os.getloadavg()}
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


async def measure(ports: dict[str, int], seconds: float) -> dict[str, Any]:
    """Every kind of request to both services in turn."""
    clients = {name: Client(port) for name, port in ports.items()}
    try:
        dim = httpx.get(f"http://127.0.0.1:{next(iter(ports.values()))}/release").json()["dim"]
        vectors = np.random.default_rng(0).normal(size=(10, dim)).round(6).tolist()
        asks = {
            "one vector": post_json("/search/vector", {"vectors": vectors[:1], "k": 10}),
            "ten vectors": post_json("/search/vector", {"vectors": vectors, "k": 10}),
            "one vector, filter": post_json(
                "/search/vector", {"vectors": vectors[:1], "k": 10, "filter": {"take": {"lt": 20_000}}}
            ),
            "clip of 5 s": post_file("/search", sound(5.0)),
        }
        return {name: await side_by_side(clients, ask, seconds) for name, ask in asks.items()}
    finally:
        for client in clients.values():
            client.close()


async def side_by_side(clients: dict[str, Client], ask: bytes, seconds: float) -> dict[str, Any]:
    """One client that asks both services in turn."""
    times: dict[str, list[float]] = {name: [] for name in clients}
    until, warm = time.perf_counter() + seconds, 5
    while time.perf_counter() < until or len(times["divided"]) < 20:
        for name, client in clients.items():
            began = time.perf_counter()
            reply = await client.ask(ask)
            assert reply.status == 200, (name, reply)
            times[name].append(1000 * (time.perf_counter() - began))
    found: dict[str, Any] = {}
    for name, seen in times.items():
        p50, p95 = np.percentile(seen[warm:], [50, 95])
        found[name] = {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2), "requests": len(seen) - warm}
    found["p50 divided / undivided"] = round(found["divided"]["p50_ms"] / found["undivided"]["p50_ms"], 2)
    found["bar"] = BAR
    return found


def make_index(work: Path, rows: int) -> str:
    """Clustered vectors with inverted lists, and an untrained encoder of the smallest kind."""
    sys.path.insert(0, str(ROOT / "tests"))
    import embedding_sets  # type: ignore[import-not-found]
    import serving  # type: ignore[import-not-found]

    encoder = serving.make_encoder()
    encoder.save(work / "encoder")
    vectors = embedding_sets.clusters(rows, encoder.dim, centres=500)
    made = embedding_sets.make_set(
        work / "set", vectors, columns={"take": list(range(rows))}, fingerprint=encoder.fingerprint
    )
    embedding_sets.make_release(work / "index", [made], save_encoder=encoder.save)
    return str(work / "index")


if __name__ == "__main__":
    main()
