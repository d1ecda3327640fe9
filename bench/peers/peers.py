#!/usr/bin/env python3
"""Times what decodes over a dense bf16 cache today, at the shapes of benches/attend.rs: PyTorch's SDPA backends, its
flex_attention, and FlashInfer's paged batch decode. Every peer is checked against fp64 before it is timed; all peers of a
shape share buffers and are sampled in turn, so that a drift of clocks or temperature meets them all.

Writes peers.json, in the form of the benches' files, into --out (default: KVLAR_BENCH_OUT, else bench/results). What is
not installed is skipped with a line that says so. `--device cpu` runs tiny shapes, to see that the script works.

FlashInfer compiles its kernels when they are first used (it needs nvcc, ninja and a C++ compiler, no network); one process
for each compiles them side by side before anything is timed. FLASHINFER_WORKSPACE_BASE says where they are kept.
"""

import argparse
import datetime
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
BATCHES = (1, 32)
LENGTHS = (4 << 10, 32 << 10, 128 << 10)
PAGES = (16, 64)
L2_BYTES = 60 << 20  # of an H200; what the device says, if that is more
L2_TIMES = 4  # the buffers of a shape together, at least
MIN_LAUNCHES = 20  # in a graph, so that the gap between replays does not count
SAMPLES = 30
SAMPLE_SECONDS = 0.01
WARM_UP_SECONDS = 2.0
TOLERANCE = 2e-2  # of bf16 operands, relative to the norm; a wrong kernel is near 1
FLASHINFER = {"cuda-cores": (False, "fa2"), "fa2": (True, "fa2"), "fa3": (True, "fa3")}


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


class Shape:
    """Buffer sets of one shape. Keys and values are flat: a peer views them in its own layout."""

    def __init__(self, torch, device, batch, rows, l2, budget):
        self.torch, self.device, self.batch, self.rows = torch, device, batch, rows
        one = 2 * batch * rows * KV_HEADS * DIM * 2
        self.bytes = one + batch * Q_HEADS * DIM * 4
        self.sets = min(max(3, L2_TIMES * l2 // one + 1), budget // one)
        self.cold = self.sets * one > 2 * l2
        self.needs = one

    def allocate(self):
        def normal(*size):
            return self.torch.empty(*size, dtype=self.torch.bfloat16, device=self.device).normal_()

        n = self.batch * self.rows * KV_HEADS * DIM
        self.q = normal(self.batch, Q_HEADS, DIM)
        self.kv = [(normal(n), normal(n)) for _ in range(self.sets)]

    def dense(self, s):
        return [x.view(self.batch, KV_HEADS, self.rows, DIM) for x in self.kv[s]]

    def error(self, out, k, v):
        """Of sequence 0, heads 0 and 1, against fp64; k and v are [rows, Hk, d] of that sequence."""
        out = out.reshape(self.batch, Q_HEADS, DIM)[0, :2].double()
        q, k, v = self.q[0, :2].double(), k[:, 0].double(), v[:, 0].double()
        reference = (q @ k.T / math.sqrt(DIM)).softmax(-1) @ v
        return ((out - reference).norm() / reference.norm()).item()


def sdpa(torch, shape):
    """(name, launch, error) of each backend; where there is none, a reason in the place of launch."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as e:
        yield "sdpa", f"this torch cannot choose backends ({e})", None
        return
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    q = shape.q.unsqueeze(2)
    for name, backend in {**names, "default": None}.items():
        chosen = getattr(SDPBackend, backend, None) if backend else None
        if backend and chosen is None:
            yield f"sdpa-{name}", "this torch does not have it", None
            continue

        def launch(s, chosen=chosen):
            k, v = shape.dense(s)
            if chosen is None:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            with sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        yield f"sdpa-{name}", launch, lambda out: shape.error(out, *[x[0].transpose(0, 1) for x in shape.dense(0)])


def flex(torch, shape):
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as e:
        yield "flex-attention", f"this torch does not have it ({e})", None
        return
    torch._dynamo.reset()  # a shape each: no limit on recompilations is met
    compiled = torch.compile(flex_attention, dynamic=False) if shape.device == "cuda" else flex_attention
    q = shape.q.unsqueeze(2)

    def launch(s):
        return compiled(q, *shape.dense(s), enable_gqa=True)

    yield "flex-attention", launch, lambda out: shape.error(out, *[x[0].transpose(0, 1) for x in shape.dense(0)])


def flashinfer_launch(torch, shape, workspace, kernel, page, layout):
    """A planned wrapper's launch, its error, and what planning took on the host."""
    import flashinfer

    tensor_cores, backend = FLASHINFER[kernel]
    # Its own graph mode pads the grid for lengths to come; a capture of a plan that stays is at least as fast.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=tensor_cores, backend=backend)
    pages = shape.rows // page
    order = torch.randperm(shape.batch * pages, device="cuda").to(torch.int32)
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((shape.batch,), page, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    bf16 = torch.bfloat16
    wrapper.plan(indptr, order, last, Q_HEADS, KV_HEADS, DIM, page, q_data_type=bf16, kv_data_type=bf16)
    torch.cuda.synchronize()
    plan_seconds = time.perf_counter() - start
    size = (-1, page, KV_HEADS, DIM) if layout == "NHD" else (-1, KV_HEADS, page, DIM)
    out = torch.empty_like(shape.q)

    def launch(s):
        return wrapper.run(shape.q, tuple(x.view(size) for x in shape.kv[s]), out=out)

    def error(result):
        rows = [x.view(size)[order[:pages].long()] for x in shape.kv[0]]
        rows = [x if layout == "NHD" else x.transpose(1, 2) for x in rows]
        return shape.error(result, *[x.reshape(-1, KV_HEADS, DIM) for x in rows])

    return launch, error, plan_seconds


class FlashInfer:
    """Which of its kernels can be built here; building is what takes long."""

    def __init__(self, torch, log, seconds):
        self.kernels = []
        try:
            version = importlib.import_module("flashinfer").__version__
        except Exception as e:
            log.skip("flashinfer", f"not importable ({first_line(e)})")
            return
        self.workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        print(f"flashinfer {version}: building kernels, up to {seconds} s", flush=True)
        command = [sys.executable, os.path.abspath(__file__), "--build"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children = {kernel: subprocess.Popen([*command, kernel], **pipes) for kernel in FLASHINFER}
        deadline = time.monotonic() + seconds
        for kernel, child in children.items():
            try:
                text, _ = child.communicate(timeout=max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
                log.skip(f"flashinfer-{kernel}", f"not built within {seconds} s")
                continue
            if child.returncode == 0:
                self.kernels.append(kernel)
            else:
                last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
                log.skip(f"flashinfer-{kernel}", f"does not run here: {last[0][:200]}")

    def peers(self, torch, shape, plans):
        for kernel in self.kernels:
            for page in PAGES:
                for layout in ("NHD", "HND"):
                    name = f"flashinfer-{kernel}/page{page}/{layout.lower()}"
                    try:
                        launch, error, plans[name] = flashinfer_launch(torch, shape, self.workspace, kernel, page, layout)
                    except Exception as e:
                        yield name, first_line(e), None
                        continue
                    yield name, launch, error


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
                "codec": "bf16",
                "batch": shape.batch,
                "rows": shape.batch * shape.rows,
                "longest": shape.rows,
                "q_heads": Q_HEADS,
                "kv_heads": KV_HEADS,
                "head_dim": DIM,
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

    def flush(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.header, "results": self.results}, indent=2) + "\n")


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


def ready(torch, clock, log, shape, suffix, peers):
    """Launches of the peers that run and are right, as (name, launches, error, replays a sample)."""
    cuda = clock.cuda
    for name, launch, error in peers:
        full = f"{name}/{suffix}"
        if isinstance(launch, str):
            log.skip(full, launch)
            continue
        try:
            wrong = error(launch(0))
            if not wrong < TOLERANCE:
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


def run_shape(torch, clock, log, shape, suffix, flashinfer):
    shape.allocate()
    plans = {}
    sources = [sdpa(torch, shape), flex(torch, shape)]
    if flashinfer is not None:
        sources.append(flashinfer.peers(torch, shape, plans))
    peers = [peer for source in sources for peer in ready(torch, clock, log, shape, suffix, source)]
    seconds = [[] for _ in peers]
    for _ in range(SAMPLES if clock.cuda else 1):
        for (_, launches, _, replays), samples in zip(peers, seconds):

            def work(launches=launches, replays=replays):
                for _ in range(replays):
                    launches.replay()

            samples.append(clock.time(work) / (replays * launches.count))
    for (name, launches, wrong, _), samples in zip(peers, seconds):
        extra = {"graph": launches.graph is not None, "relative_error": wrong}
        if name in plans:
            extra["plan_microseconds"] = plans[name] * 1e6
        log.add(f"{name}/{suffix}", shape, launches, samples, extra)
    log.flush()


def driver_version():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def build(kernel):
    """A child's work: one tiny launch, which compiles and loads the kernel."""
    import torch

    shape = Shape(torch, "cuda", 1, 256, 0, 1 << 30)
    shape.allocate()
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    launch, error, _ = flashinfer_launch(torch, shape, workspace, kernel, 16, "NHD")
    wrong = error(launch(0))
    if not wrong < TOLERANCE:
        sys.exit(f"wrong result: relative error {wrong:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("KVLAR_BENCH_OUT", "bench/results")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--build-seconds", type=int, default=240, help="what FlashInfer's kernels may take to compile")
    parser.add_argument("--build", choices=FLASHINFER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as e:
        return print(f"peers: skipped: torch is not installed ({e})")
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        return print(f"peers: skipped: torch {torch.__version__} sees no GPU")
    if cuda:  # for FlashInfer: compile for this GPU alone
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}" + ("a" if major >= 9 else ""))
    if arguments.build:
        return build(arguments.build)
    torch.manual_seed(1)
    clock = Clock(torch, cuda)
    header = {
        "op": "peers",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver_version() if cuda else None,
        "date": os.environ.get("KVLAR_BENCH_DATE") or datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "clock": "CUDA events" if cuda else "wall clock",
        "torch": torch.__version__,
    }
    log = Log(arguments.out / "peers.json", header)
    flashinfer, l2, budget, batches, lengths = None, 0, 1 << 30, (1, 2), (256,)
    if cuda:
        flashinfer = FlashInfer(torch, log, arguments.build_seconds)
        properties = torch.cuda.get_device_properties(0)
        l2 = max(L2_BYTES, getattr(properties, "L2_cache_size", 0))
        batches, lengths = BATCHES, LENGTHS
        header["copy_ceiling"] = copy_ceiling(torch, clock)
        log.ceiling = header["copy_ceiling"]["bytes_per_second"]
        log.line(f"{header['gpu']}, driver {header['driver']}, torch {torch.__version__}")
        log.line(f"copy ceiling: {log.ceiling / 1e12:.2f} TB/s")
    else:
        header["emulated"] = "the peers ran on the CPU; their times are not a speed and are left out"
        log.skip("flashinfer", "needs a GPU")
    for batch in batches:
        for rows in lengths:
            shape = None
            if cuda:
                gc.collect()  # captured closures are cycles, and hold the last shape's buffers
                torch.cuda.empty_cache()
                budget = torch.cuda.mem_get_info()[0] // 2
            shape, suffix = Shape(torch, arguments.device, batch, rows, l2, budget), f"bf16/b{batch}/t{rows}"
            if shape.sets == 0:
                log.skip(suffix, f"needs {shape.needs / 1e9:.1f} GB, may take {budget / 1e9:.1f} GB")
                continue
            run_shape(torch, clock, log, shape, suffix, flashinfer)
    log.flush()
    print("\n" + "\n".join(log.lines) + f"\nwritten: {log.path}")


if __name__ == "__main__":
    main()
