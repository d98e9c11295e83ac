"""The explorer under load: how fast it starts and answers, and whether many clients change what it says.

    .venv/bin/python benchmarks/explore.py --runs runs [--config configs/smollm2.yaml] [--seconds 60] [--clients 50]

Starts `pipeline explore` and ends it with Ctrl-C. Prints JSON: seconds to the first answer; milliseconds of pages,
texts and first tokens asked by one client; percentiles of /api/features for 32 tokens asked by eight clients; then what
many clients meet, of whom a third hang up at random: answers by status, kinds of answers that are not those to a client
alone, and how much the server's memory moves over the last two thirds of the time. Exits with 1 for an error but 429,
a different answer, or memory that moves by more than 5%.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

SENTENCE = "wait let me check that the sum of two even numbers is even so therefore it holds for all"
FLAT = 0.05  # how far memory may move
VARYING = ("ms", "id", "created")  # of answers, from one asking to the next


class Server:
    """`pipeline explore` as a process."""

    def __init__(self, config: str, runs: str) -> None:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "pipeline", "explore", "--no-open", "--config", config, "--runs", runs]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
        assert self.process.stdout
        self.url = next(line.strip() for line in self.process.stdout if line.startswith("http")).rstrip("/")

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    def end(self) -> dict[str, Any]:
        """Ctrl-C, and how long it takes to end."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(30)
        return {"ends_after_ctrl_c_s": round(time.monotonic() - began, 2), "exit_status": status}


def heard() -> None:
    """Ctrl-C is heard also by what a shell has started in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def text_of(tokens: int, seed: int) -> str:
    """So many words, which are a token each to most tokenizers."""
    rng = random.Random(seed)
    return " ".join(rng.choice(SENTENCE.split()) for _ in range(tokens))


def timed(client: httpx.Client, method: str, path: str, **options: Any) -> float:
    """Milliseconds of a request that is answered."""
    began = time.perf_counter()
    client.request(method, path, **options).raise_for_status()
    return 1000 * (time.perf_counter() - began)


def first_token(client: httpx.Client) -> float:
    """Milliseconds to the first token of a steered answer."""
    began = time.perf_counter()
    operations = [{"feature": 1, "op": "ablate"}]
    body = {"prompt": "Is 91 a prime number?", "operations": operations, "max_new_tokens": 8}
    with client.stream("POST", "/api/steer", json=body) as answer:
        pieces = answer.iter_text()
        next(pieces)
        found = 1000 * (time.perf_counter() - began)
        for _ in pieces:
            pass
    return found


def alone(client: httpx.Client, sae: str, d_sae: int) -> dict[str, Any]:
    """Milliseconds of what one client asks; medians of several."""
    rng = random.Random(0)
    text = {tokens: text_of(tokens, tokens) for tokens in (12, 512, 4096)}

    def median(count: int, method: str, path: str, **options: Any) -> float:
        return round(statistics.median(timed(client, method, path, **options) for _ in range(count)), 1)

    pages = [timed(client, "GET", f"/feature/{sae}/{rng.randrange(d_sae)}") for _ in range(30)]
    asked = {f"features_{n}_tokens_ms": (5 if n < 4096 else 1, {"text": t}) for n, t in text.items()}
    return {
        "page_ms": median(5, "GET", "/"),
        "feature_page_ms": {"median": round(statistics.median(pages), 1), "max": round(max(pages), 1)},
        "card_ms": median(5, "GET", f"/api/feature/{sae}/7"),
        "find_ms": median(5, "GET", "/api/find?token=wait"),
        **{name: median(n, "POST", "/api/features", json=body) for name, (n, body) in asked.items()},
        "first_token_ms": round(statistics.median(first_token(client) for _ in range(5)), 1),
    }


async def eight(url: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of 32 tokens' features, asked by eight clients as fast as they are answered."""
    found: list[float] = []
    stop = time.monotonic() + seconds

    async def ask(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while time.monotonic() < stop:
                began = time.perf_counter()
                answer = await client.post("/api/features", json={"text": text_of(32, number)})
                answer.raise_for_status()
                found.append(1000 * (time.perf_counter() - began))

    await asyncio.gather(*(ask(number) for number in range(8)))
    p50, p95 = statistics.quantiles(found, n=100)[49], statistics.quantiles(found, n=100)[94]
    return {"requests": len(found), "p50_ms": round(p50, 1), "p95_ms": round(p95, 1)}


def requests(sae: str, d_sae: int) -> list[tuple[str, str, Any]]:
    """What the crowd asks: reading, finding, and short answers with and without operations."""
    rng = random.Random(1)
    numbers = [rng.randrange(d_sae) for _ in range(6)]
    operations = [[{"feature": number, "op": "ablate"}] for number in numbers]
    said = {"max_new_tokens": 6, "temperature": 0.8}
    completed = {"max_tokens": 5, "temperature": 0.8}
    return [
        *(("POST", "/api/features", {"text": text_of(n, n)}) for n in (4, 8, 16, 24, 32, 48)),
        *(("GET", f"/feature/{sae}/{number}", None) for number in numbers),
        *(("GET", f"/api/feature/{sae}/{number}", None) for number in numbers),
        ("GET", "/api/find?token=wait", None),
        ("POST", "/api/find", {"yes": ["wait, let me check"], "no": ["the sum"]}),
        *(
            ("POST", "/api/steer", said | {"prompt": text_of(6, n), "operations": operation, "seed": n, "shade": n})
            for n, operation in enumerate(operations)
        ),
        *(
            ("POST", "/v1/completions", completed | {"prompt": text_of(5, n), "operations": operation, "seed": n})
            for n, operation in enumerate(operations)
        ),
    ]


def lasting(answer: httpx.Response) -> Any:
    """An answer without what differs each time."""
    if not answer.headers["content-type"].startswith("application/json"):
        # The tokens of two sides come one after another, but which of them comes first may differ.
        return sorted(answer.text.split("\n\n")) if "event-stream" in answer.headers["content-type"] else answer.text
    return {name: value for name, value in answer.json().items() if name not in VARYING}


class Crowd:
    """Clients that ask at once, and what they met."""

    def __init__(self, url: str, asked: list[tuple[str, str, Any]], expected: list[Any], seconds: float) -> None:
        self.url, self.asked, self.expected = url, asked, expected
        self.stop = time.monotonic() + seconds
        self.met: Counter[str] = Counter()
        self.different: list[str] = []

    async def client(self, number: int) -> None:
        """One of them; every third hangs up at random."""
        rng, hangs_up = random.Random(number), number % 3 == 0
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.stop:
                which = rng.randrange(len(self.asked))
                method, path, body = self.asked[which]
                try:
                    asking = client.request(method, path, json=body)
                    answer = await (asyncio.wait_for(asking, rng.uniform(0, 1)) if hangs_up else asking)
                except TimeoutError:
                    self.met["hung up"] += 1
                    continue
                except httpx.HTTPError as error:
                    self.met[type(error).__name__] += 1
                    continue
                self.met[str(answer.status_code)] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(float(answer.headers["retry-after"]) * rng.uniform(0.2, 1))
                elif answer.status_code == 200 and lasting(answer) != self.expected[which]:
                    self.different.append(path)


async def crowd(server: Server, asked: list[tuple[str, str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """What many clients meet, and the server's memory meanwhile."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answers = [await client.request(method, path, json=body) for method, path, body in asked]
    found = Crowd(server.url, asked, [lasting(answer.raise_for_status()) for answer in answers], seconds)
    began, memory = time.monotonic(), []

    async def watch() -> None:
        while time.monotonic() < found.stop:
            memory.append((time.monotonic() - began, server.resident))
            await asyncio.sleep(0.5)

    await asyncio.gather(watch(), *(found.client(number) for number in range(clients)))
    last = [size for at, size in memory if at > seconds / 3]
    return {
        "clients": clients,
        "seconds": seconds,
        "met": dict(found.met),
        "different": sorted(set(found.different)),
        "memory_MB": {
            "first": round(memory[0][1] / 1e6),
            "last_two_thirds": [round(min(last) / 1e6), round(max(last) / 1e6)],
        },
        "memory_moves": round((max(last) - min(last)) / min(last), 4),
    }


def measured(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """All figures."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        first_page = timed(client, "GET", "/")
        start = {"first_answer_s": round(time.monotonic() - server.began, 2), "first_page_ms": round(first_page, 1)}
        timed(client, "POST", "/api/features", json={"text": "wait"})
        start["first_text_s"] = round(time.monotonic() - server.began, 2)
        (sae, *_) = client.get("/api/saes").json()["saes"]
        by_one = alone(client, sae["id"], sae["d_sae"])
    return {
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "date": time.strftime("%Y-%m-%d"),
        "start": start,
        "one_client": by_one,
        "eight_clients_32_tokens": asyncio.run(eight(server.url, 10)),
        "crowd": asyncio.run(crowd(server, requests(sae["id"], sae["d_sae"]), clients, seconds)),
    }


def main() -> None:
    """Measure, print, and say by the exit status whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--config", default="configs/smollm2.yaml")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    given = parser.parse_args()
    server = Server(given.config, given.runs)
    try:
        found = measured(server, given.clients, given.seconds)
    finally:
        ended = server.end()
    print(json.dumps(found | ended, indent=1))
    met = found["crowd"]
    well = not met["different"] and not {*met["met"]} - {"200", "429", "hung up"} and met["memory_moves"] <= FLAT
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
