"""What the peers are timed with: launches over rotating buffers, samples in turn, lines and the results file."""

import json
import math
import time
from typing import Any, NamedTuple

Q_HEADS, KV_HEADS, DIM = 32, 8, 128  # of Llama-3.1-8B
L2_TIMES = 4  # the buffers of a shape together, at least
MIN_LAUNCHES = 20  # in a graph, so that the gap between replays does not count
SAMPLES = 30
SHAPE_SECONDS = 8.0  # after which the samples of a shape end, once there are these
FEWEST_SAMPLES = 5
SAMPLE_SECONDS = 0.01
WARM_UP_SECONDS = 2.0
TOLERANCE = 2e-2  # of bf16 operands, relative to the norm; a wrong kernel is near 1


class Peer(NamedTuple):
    name: str
    launch: Any  # of the number of a buffer set; or the reason why there is none
    error: Any  # of a launch's result, against fp64
    tolerance: float = TOLERANCE


def attention_error(out, q, k, v):
    """Of some query heads of one kv head: out and q are [heads, d], k and v [rows, d]; against fp64."""
    out, q, k, v = (x.double() for x in (out, q, k, v))
    reference = (q @ k.T / math.sqrt(DIM)).softmax(-1) @ v
    return ((out - reference).norm() / reference.norm()).item()


def first_line(e):
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0][:200]}" if text else type(e).__name__


def percentile(x, p):
    x = sorted(x)
    return x[round(p * (len(x) - 1))]


class Clock:
    """Seconds that work takes on the device."""

    def __init__(self, torch, cuda):
        self.torch, self.cuda = torch, cuda
        if cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, work):
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self.torch.cuda.synchronize()
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


class Launches:
    """A peer's launches over all buffer sets: a captured graph, or a loop where the peer cannot be captured."""

    def __init__(self, torch, cuda, sets, launch):
        rounds = math.ceil(MIN_LAUNCHES / sets)
        self.count, self.graph, self.why = sets * rounds, None, None

        def every_set():
            for _ in range(rounds):
                for s in range(sets):
                    launch(s)

        self.replay = every_set
        if not cuda:
            return
        try:
            side = torch.cuda.Stream()  # first runs compile and allocate, which a capture must not
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                every_set()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                every_set()
            self.graph, self.replay = graph, graph.replay
        except Exception as e:  # the loop still times it, with launch gaps
            torch.cuda.synchronize()
            self.why = first_line(e)


def buffer_sets(each, l2, budget):
    """How many buffer sets of `each` bytes, and whether every launch then reads memory; none if one is above the budget."""
    sets = min(max(3, L2_TIMES * l2 // each + 1), budget // each)
    return sets, sets * each > 2 * l2


class Log:
    """Lines and the file."""

    def __init__(self, path, header):
        self.path, self.header, self.results, self.lines, self.ceiling = path, header, [], [], None

    def line(self, text):
        print(text, flush=True)
        self.lines.append(text)

    def skip(self, name, why):
        self.results.append({"name": name, "skipped": why})
        self.line(f"peers/{name}: skipped: {why}")

    def add(self, name, shape, launches, seconds, extra):
        p10, p50, p90 = (percentile(seconds, p) for p in (0.1, 0.5, 0.9))
        result = {
            "name": name,
            "parameters": {
                "dtype": "bf16",
                "batch": shape.batch,
                "rows": shape.batch * shape.rows,
                "longest": shape.rows,
                "q_heads": Q_HEADS,
                "kv_heads": KV_HEADS,
                "head_dim": DIM,
                **shape.storage,
            },
            "bytes": shape.bytes,
            "sets": shape.sets,
            "launches_a_replay": launches.count,
            "samples": len(seconds),
            **extra,
        }
        if self.ceiling is None:
            self.results.append(result)
            return self.line(f"peers/{name}: ran on the CPU, not a speed (relative error {extra['relative_error']:.1e})")
        speed = shape.bytes / p50
        percent = 100 * speed / self.ceiling
        result["microseconds"] = {"p10": p10 * 1e6, "p50": p50 * 1e6, "p90": p90 * 1e6}
        result |= {"bytes_per_second": speed, "percent_of_copy_ceiling": percent, "cold_l2": shape.cold}
        self.results.append(result)
        graph = "" if launches.graph else f", not captured: {launches.why}"
        self.line(
            f"peers/{name}: {p50 * 1e6:.2f} µs (p10 {p10 * 1e6:.2f}, p90 {p90 * 1e6:.2f}), {shape.bytes / 1e6:.1f} MB, "
            f"{speed / 1e12:.2f} TB/s, {percent:.1f} % of the copy ceiling{graph}"
        )

    def flush(self, complete=False):
        """Whoever finds the file after a crash has all that came before, and sees that there was to be more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({**self.header, "complete": complete, "results": self.results}, indent=2) + "\n")
        part.replace(self.path)


def copy_ceiling(torch, clock):
    """Bytes a second of a copy far larger than any cache, read and written, once clocks have settled."""
    n = min(1 << 30, torch.cuda.mem_get_info()[0] // 4)
    a = torch.randint(256, (n,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    start = time.monotonic()
    while time.monotonic() - start < WARM_UP_SECONDS:
        clock.time(lambda: b.copy_(a))
    seconds = percentile([clock.time(lambda: b.copy_(a)) for _ in range(SAMPLES)], 0.5)
    return {"bytes": 2 * n, "microseconds": seconds * 1e6, "bytes_per_second": 2 * n / seconds}


def ready(torch, clock, log, shape, peers):
    """Launches of the peers that run and are right, as (name, launches, error, replays a sample)."""
    cuda = clock.cuda
    for peer in peers:
        name, launch, error, tolerance = Peer(*peer)
        full = f"{name}/{shape.name}"
        if isinstance(launch, str):
            log.skip(full, launch)
            continue
        try:
            wrong = error(launch(0))
            if not wrong < tolerance:
                log.skip(full, f"wrong result: relative error {wrong:.1e}")
                continue
            launches = Launches(torch, cuda, shape.sets, launch)
            launches.replay()
            once = clock.time(launches.replay)
            replays = max(1, round(SAMPLE_SECONDS / max(once, 1e-9))) if cuda else 1
        except Exception as e:
            log.skip(full, first_line(e))
            continue
        yield name, launches, wrong, replays


def run_shape(torch, clock, log, shape, sources, plans=()):
    """Samples all peers of a shape in turn. `sources` yield what `Peer` is made of; `plans` has the seconds that some take to
    plan, by name."""
    if shape.sets == 0:
        return log.skip(shape.name, f"one buffer set needs {shape.needs / 1e9:.1f} GB, more than it may take")
    shape.allocate()
    peers = [peer for source in sources for peer in ready(torch, clock, log, shape, source)]
    seconds = [[] for _ in peers]
    start = time.monotonic()
    for sample in range(SAMPLES if clock.cuda else 1):
        if sample >= FEWEST_SAMPLES and time.monotonic() - start > SHAPE_SECONDS:
            break
        for (_, launches, _, replays), samples in zip(peers, seconds):

            def work(launches=launches, replays=replays):
                for _ in range(replays):
                    launches.replay()

            samples.append(clock.time(work) / (replays * launches.count))
    for (name, launches, wrong, _), samples in zip(peers, seconds):
        extra = {"graph": launches.graph is not None, "relative_error": wrong}
        if name in plans:
            extra["plan_microseconds"] = plans[name] * 1e6
        log.add(f"{name}/{shape.name}", shape, launches, samples, extra)
    log.flush()
