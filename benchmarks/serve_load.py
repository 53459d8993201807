"""The service under load, beside what its parts cost without it: latency, overload, stalled clients, fairness.

    python benchmarks/serve_load.py                     # generated sounds; starts the service and stops it
    python benchmarks/serve_load.py --index INDEX --audio clip.wav

One run measures, on one machine: the bare calls in a process of their own (decode, encode, search), an empty route of
the same service (/healthz), and the service at 1, 8 and 64 clients, turn by turn, as a machine's speed drifts; then an
open loop at ten times what it can do, a thousand clients that stop in the middle of their request, and short clips
beside four ten-minute uploads. The client (`_client.py`) is on the same machine; its CPU seconds are said.
"""

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
import uvloop
from _client import Client, Reply, get, post, post_file
from _service import ROOT, serve_run

OUT = ROOT / "docs" / "benchmarks" / "serve_load.json"
CLIENTS = (1, 8, 64)
RATE = 16_000
LONG_S, LONG_UPLOADS = 600, 4
STALLED = 1000
OVERLOAD = 10
ROUNDS = 5  # of each side, by turns
BARE = {"search_vector": "search", "search_100_vectors": "search_100_vectors", "search": "decode_encode_search"}


@dataclass
class Sample:
    """What clients saw: milliseconds of the answered, statuses, seconds it lasted."""

    answered_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    refused: int = 0
    refused_well: int = 0
    seconds: float = 0.0
    client_cpu_s: float = 0.0

    def take(self, reply: Reply, milliseconds: float) -> None:
        """Note one answer."""
        self.statuses[reply.status] += 1
        if reply.status == 200:
            self.answered_ms.append(milliseconds)
            return
        self.refused += 1
        problem = reply.headers.get("content-type") == "application/problem+json"
        self.refused_well += problem and (reply.status not in (429, 503) or "retry-after" in reply.headers)

    def add(self, other: "Sample") -> None:
        """Take in what other clients saw at another time."""
        self.answered_ms += other.answered_ms
        self.statuses += other.statuses
        self.refused, self.refused_well = self.refused + other.refused, self.refused_well + other.refused_well
        self.seconds, self.client_cpu_s = self.seconds + other.seconds, self.client_cpu_s + other.client_cpu_s

    def summary(self) -> dict[str, Any]:
        """Percentiles and rates."""
        times = self.answered_ms or [float("nan")]
        p50, p95, p99 = (round(float(value), 2) for value in np.percentile(times, [50, 95, 99]))
        return {
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "answered_per_s": round(len(self.answered_ms) / max(self.seconds, 1e-9), 1),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "refusals_with_problem_and_retry_after": f"{self.refused_well} of {self.refused}",
            "client_cpus": round(self.client_cpu_s / max(self.seconds, 1e-9), 2),
        }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", help="an INDEX; default: one of generated sounds and an untrained encoder")
    parser.add_argument("--audio", help="the clip to search with; default: five generated seconds")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default 5)")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()
    if args.bare:
        bare(args.index, Path(args.audio).read_bytes())
        return
    with tempfile.TemporaryDirectory() as work:
        index = args.index or make_index(Path(work))
        clip = Path(args.audio) if args.audio else Path(work) / "clip.wav"
        if not args.audio:
            clip.write_bytes(sound(5.0))
        report: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()}
        with serve_run(index) as port, Bare(index, clip) as alone:
            report |= uvloop.run(measure(port, clip.read_bytes(), args.seconds, alone))
    report["load_after"] = os.getloadavg()
    report["ratios"] = ratios(report)
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


class Bare:
    """The calls that a query needs, without a service, in a process of their own that waits for its turn."""

    def __init__(self, index: str, clip: Path) -> None:
        command = [sys.executable, __file__, "--bare", "--index", index, "--audio", str(clip)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, name: str, seconds: float) -> list[float]:
        """Milliseconds of each call in so many seconds of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(name, seconds, file=self._process.stdin, flush=True)
        times: list[float] = json.loads(self._process.stdout.readline())
        return times


def bare(index_dir: str, data: bytes) -> None:
    """What `Bare` asks for: for each line `NAME SECONDS` on standard input the milliseconds of the calls, as JSON."""
    from audiomae import AudioEncoder, AudioIndex
    from audiomae.corpus.decode import iter_windows

    index = AudioIndex.open(index_dir)
    encoder = AudioEncoder.load(str(index.encoder_dir), device="cpu")
    window_s = index.release.info["corpora"][0].get("window_s") or encoder.window_s
    vector = np.random.default_rng(0).normal(size=(1, index.dim)).astype(np.float32)
    hundred = np.random.default_rng(0).normal(size=(100, index.dim)).astype(np.float32)

    def query() -> None:
        windows = [window.samples for window in iter_windows(data, encoder.sample_rate, window_s, window_s)]
        _ = index.search(encoder.embed(windows).mean(axis=0), k=10).items

    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: index.search(vector, k=10).items,
        "search_100_vectors": lambda: index.search(hundred, k=10).items,
        "decode_encode_search": query,
    }
    for line in sys.stdin:
        name, seconds = line.split()
        times, until = [], time.perf_counter() + float(seconds)
        while time.perf_counter() < until:
            began = time.perf_counter()
            calls[name]()
            times.append(1000 * (time.perf_counter() - began))
        print(json.dumps(times), flush=True)


async def measure(port: int, clip: bytes, seconds: float, alone: Bare) -> dict[str, Any]:
    """Everything that is asked of the running service."""
    http = Client(port)
    dim = httpx.get(f"http://127.0.0.1:{port}/release").json()["dim"]
    one, hundred = (np.random.default_rng(0).normal(size=(count, dim)).round(6).tolist() for count in (1, 100))
    asks = {
        "empty_route": get("/healthz"),
        "search_vector": post_json("/search/vector", {"vectors": one, "k": 10}),
        "search_100_vectors": post_json("/search/vector", {"vectors": hundred, "k": 10}),
        "search": post_file("/search", clip),
    }
    report: dict[str, Any] = {}
    for name, ask in asks.items():
        await closed_loop(http, ask, 1, 1.0)
        if name in BARE:
            alone.run(BARE[name], 1.0)
        report[name] = {}
        for clients in CLIENTS:
            ours, empty, calls = Sample(), Sample(), []
            for _ in range(ROUNDS):
                if name in BARE:
                    calls += alone.run(BARE[name], seconds / ROUNDS)
                    empty.add(await closed_loop(http, asks["empty_route"], 1, seconds / ROUNDS))
                ours.add(await closed_loop(http, ask, clients, seconds / (1 if clients > 1 else ROUNDS)))
            report[name][str(clients)] = ours.summary()
            if calls:
                beside = {
                    "p50_ms": round(float(np.median(calls)), 3),
                    "per_s": round(1000 * len(calls) / sum(calls), 1),
                }
                report[name][str(clients)] |= {"bare": beside, "empty_route_p50_ms": empty.summary()["p50_ms"]}
    peak = max(report["search"][str(clients)]["answered_per_s"] for clients in CLIENTS)
    calm, storm = Sample(), Sample()
    for _ in range(2):
        calm.add(await open_loop(http, asks["search"], peak, 2 * seconds))
        storm.add(await open_loop(http, asks["search"], OVERLOAD * peak, 2 * seconds))
        await asyncio.sleep(2)
    report["overload"] = {
        "at_capacity": calm.summary(),
        "offered_per_s": OVERLOAD * peak,
        "at_ten_times": storm.summary(),
    }
    report["stalled_clients"] = await stalled(http, port, seconds)
    report["fairness"] = await fairness(http, asks["search"], seconds)
    http.close()
    return report


async def closed_loop(http: Client, ask: bytes, clients: int, seconds: float) -> Sample:
    """So many clients, each asking again when it has its answer."""
    sample, began, worked = Sample(), time.perf_counter(), time.process_time()

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            await timed(http, ask, sample)

    await asyncio.gather(*(client() for _ in range(clients)))
    sample.seconds, sample.client_cpu_s = time.perf_counter() - began, time.process_time() - worked
    return sample


async def open_loop(http: Client, ask: bytes, per_s: float, seconds: float) -> Sample:
    """Requests at a rate, whether the earlier ones were answered or not; goodput is over the time they are sent in."""
    sample, began, worked = Sample(), time.perf_counter(), time.process_time()
    tasks = []
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(timed(http, ask, sample)))
    sample.seconds, sample.client_cpu_s = time.perf_counter() - began, time.process_time() - worked
    await asyncio.gather(*tasks)
    return sample


async def timed(http: Client, ask: bytes, sample: Sample) -> None:
    """One request; a connection that breaks counts as status 0."""
    began = time.perf_counter()
    reply = await http.ask(ask)
    sample.take(reply, 1000 * (time.perf_counter() - began))


async def stalled(http: Client, port: int, seconds: float) -> dict[str, Any]:
    """/healthz while a thousand clients have sent headers and five bytes of their body."""
    request = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    request += b"Content-Length: 100000\r\n\r\n--B\r\n"
    writers = []
    for _ in range(STALLED):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        writers.append(writer)
    await asyncio.sleep(1)
    sample = await closed_loop(http, get("/healthz"), 1, seconds)
    for writer in writers:
        writer.close()
    return {"clients": STALLED, "healthz": sample.summary()}


async def fairness(http: Client, ask: bytes, seconds: float) -> dict[str, Any]:
    """A short clip's latency alone and beside four uploads of ten minutes."""
    alone = await closed_loop(http, ask, 1, seconds)
    upload = post_file("/search", sound(LONG_S, "FLAC"))
    others = Sample()
    tasks = [asyncio.create_task(timed(http, upload, others)) for _ in range(LONG_UPLOADS)]
    await asyncio.sleep(1)
    beside = Sample()
    began = time.perf_counter()
    while not all(task.done() for task in tasks):
        await timed(http, ask, beside)
    beside.seconds = time.perf_counter() - began
    return {
        "alone": alone.summary(),
        "beside_four_uploads": beside.summary(),
        "uploads_s": [round(value / 1000, 1) for value in others.answered_ms],
        "uploads": {str(status): count for status, count in others.statuses.items()},
    }


def post_json(path: str, value: Any) -> bytes:
    """A request with JSON."""
    return post(path, json.dumps(value).encode(), "application/json")


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """The figures that have a bar."""
    one = {name: report[name]["1"] for name in BARE}
    overload, fair, many = report["overload"], report["fairness"], report["search"]["64"]
    peak = overload["offered_per_s"] / OVERLOAD

    def over_both(seen: dict[str, Any]) -> float:
        return float(seen["p50_ms"] / (seen["bare"]["p50_ms"] + seen["empty_route_p50_ms"]))

    found = {
        "search_vector / (bare search + empty route)": over_both(one["search_vector"]),
        "search_100_vectors / (bare + empty route)": over_both(one["search_100_vectors"]),
        "search / bare decode+encode+search": one["search"]["p50_ms"] / one["search"]["bare"]["p50_ms"],
        "search at 64 clients / bare loop": many["answered_per_s"] / many["bare"]["per_s"],
        "accepted p99 at 10x / at capacity": overload["at_ten_times"]["p99_ms"] / overload["at_capacity"]["p99_ms"],
        "goodput at 10x / peak": overload["at_ten_times"]["answered_per_s"] / peak,
        "short clip beside four uploads / alone": fair["beside_four_uploads"]["p50_ms"] / fair["alone"]["p50_ms"],
    }
    return {name: round(value, 2) for name, value in found.items()}


def make_index(work: Path) -> str:
    """Two hundred generated sounds, an untrained encoder of the smallest kind, published."""
    sys.path.insert(0, str(ROOT / "tests"))
    import serving  # type: ignore[import-not-found]

    corpus = work / "corpus"
    for label in serving.CLASSES:
        (corpus / label).mkdir(parents=True)
        for variant in range(50):
            noise = np.random.default_rng(variant).normal(0, 0.01, 2 * RATE).astype(np.float32)
            soundfile.write(corpus / label / f"{variant}.wav", serving.sound(label, variant % 12) + noise, RATE)
    serving.publish_release(work / "index", corpus, serving.make_encoder(), work / "staging")
    return str(work / "index")


def sound(seconds: float, format: str = "WAV") -> bytes:
    """Noise with a tone in it, as the bytes of a file."""
    times = np.arange(round(seconds * RATE)) / RATE
    samples = 0.2 * np.sin(2 * np.pi * 440 * times) + np.random.default_rng(0).normal(0, 0.05, len(times))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), RATE, format=format)
    return file.getvalue()


if __name__ == "__main__":
    main()
