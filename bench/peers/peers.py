#!/usr/bin/env python3
"""Times what decodes today. Over a dense bf16 cache, at the shapes of benches/attend.rs: PyTorch's SDPA backends, its
flex_attention, and FlashInfer's paged batch decode. Over low-rank keys and values, at the shapes of
benches/attend_lowrank.rs: PyTorch rebuilds all rows, then SDPA (lowrank.py). Every peer is checked against fp64 before it is
timed; all peers of a shape share buffers and are sampled in turn, so that a drift of clocks or temperature meets them all.

Writes peers.json, in the form of the benches' files, into --out (default: KVLAR_BENCH_OUT, else bench/results). What is
not installed is skipped with a line that says so. `--device cpu` runs tiny shapes, to see that the script works; `--only`
leaves the other kind of cache out.

FlashInfer compiles its kernels when they are first used (it needs nvcc, ninja and a C++ compiler, no network); one process
for each compiles them side by side before anything is timed. FLASHINFER_WORKSPACE_BASE says where they are kept.
"""

import argparse
import datetime
import gc
import importlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import lowrank
from timing import DIM, KV_HEADS, Q_HEADS, TOLERANCE, Clock, Log, buffer_sets, copy_ceiling, first_line, run_shape

BATCHES = (1, 32)
LENGTHS = (4 << 10, 32 << 10, 128 << 10)
KINDS = ("dense", "lowrank")
PAGES = (16, 64)
L2_BYTES = 60 << 20  # of an H200; what the device says, if that is more
FLASHINFER = {"cuda-cores": (False, "fa2"), "fa2": (True, "fa2"), "fa3": (True, "fa3")}


class Shape:
    """Buffer sets of one shape. Keys and values are flat: a peer views them in its own layout."""

    def __init__(self, torch, device, batch, rows, l2, budget):
        self.torch, self.device, self.batch, self.rows = torch, device, batch, rows
        one = 2 * batch * rows * KV_HEADS * DIM * 2
        self.bytes = one + batch * Q_HEADS * DIM * 4
        self.sets, self.cold = buffer_sets(one, l2, budget)
        self.needs, self.storage, self.name = one, {"codec": "bf16"}, f"bf16/b{batch}/t{rows}"

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
    parser.add_argument("--only", choices=KINDS, help="one kind of cache")
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
    dense, low_rank = (arguments.only in (None, kind) for kind in KINDS)
    flashinfer, l2, batches, lengths, lowrank_lengths = None, 0, (1, 2), (256,), (256,)
    if cuda:
        flashinfer = FlashInfer(torch, log, arguments.build_seconds) if dense else None
        properties = torch.cuda.get_device_properties(0)
        l2 = max(L2_BYTES, getattr(properties, "L2_cache_size", 0))
        batches, lengths, lowrank_lengths = BATCHES, LENGTHS, lowrank.LENGTHS
        header["copy_ceiling"] = copy_ceiling(torch, clock)
        log.ceiling = header["copy_ceiling"]["bytes_per_second"]
        log.line(f"{header['gpu']}, driver {header['driver']}, torch {torch.__version__}")
        log.line(f"copy ceiling: {log.ceiling / 1e12:.2f} TB/s")
    else:
        header["emulated"] = "the peers ran on the CPU; their times are not a speed and are left out"
        if dense:
            log.skip("flashinfer", "needs a GPU")

    def budget():
        if not cuda:
            return 1 << 30
        gc.collect()  # captured closures are cycles, and hold the last shape's buffers
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] // 2

    # In functions, so that a shape's buffers are gone before the next one's budget is asked for.
    def run_lowrank(rows, size, kept):
        shape = lowrank.Shape(torch, arguments.device, rows, size, kept, l2, budget())
        run_shape(torch, clock, log, shape, [lowrank.peers(torch, shape)])

    def run_dense(batch, rows):
        shape, plans = Shape(torch, arguments.device, batch, rows, l2, budget()), {}
        sources = [sdpa(torch, shape), flex(torch, shape)]
        if flashinfer is not None:
            sources.append(flashinfer.peers(torch, shape, plans))
        run_shape(torch, clock, log, shape, sources, plans)

    if low_rank:
        for setting in itertools.product(lowrank_lengths, lowrank.SIZES, lowrank.KEPT):
            run_lowrank(*setting)
    if dense:
        for setting in itertools.product(batches, lengths):
            run_dense(*setting)
    log.flush()
    print("\n" + "\n".join(log.lines) + f"\nwritten: {log.path}")


if __name__ == "__main__":
    main()
