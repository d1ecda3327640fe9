#!/usr/bin/env python3
"""Times what decodes today, at the shapes of the benches, by kinds of caches:
dense      bf16 (benches/attend.rs): PyTorch's SDPA backends, its flex_attention, FlashInfer's paged batch decode.
lowrank    low-rank keys and values (benches/attend_lowrank.rs): PyTorch rebuilds all rows, then SDPA.
quantized  fp8 and integer codes (benches/attend_quantized.rs): FlashInfer over fp8; PyTorch dequantizes, then SDPA. Scores
           alone (benches/scan.rs): PyTorch's products, and lookups of product codes.
eviction   which rows stay, and moving them together (benches/select.rs, benches/compact.rs): PyTorch's topk and copies,
           FlashInfer's top_k.
Every peer is checked against fp64 before it is timed; all peers of a shape share buffers and are sampled in turn, so that a
drift of clocks or temperature meets them all.

Writes peers.json, in the form of the benches' files, into --out (default: KVLAR_BENCH_OUT, else bench/results). What is
not installed is skipped with a line that says so. `--device cpu` runs tiny shapes, to see that the script works. `--only`
(default: KVLAR_PEERS) takes one kind of cache, into peers-KIND.json.

FlashInfer compiles its kernels when they are first used (it needs nvcc, ninja and a C++ compiler, no network); one process
for each compiles them side by side before anything is timed. FLASHINFER_WORKSPACE_BASE says where they are kept, and
`--build-only` compiles them and does nothing else.
"""

import argparse
import datetime
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import dense
import eviction
import lowrank
import paged
import quantized
import scan
import timing
from timing import Clock, Log, copy_ceiling, run_shape

KINDS = ("dense", "lowrank", "quantized", "eviction")
TINY = 256  # rows, on a CPU
L2_BYTES = 60 << 20  # of an H200; what the device says, if that is more


def driver_version():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0] + ".")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("KVLAR_BENCH_OUT", "bench/results")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default=os.environ.get("KVLAR_PEERS") or None, help=", ".join(KINDS))
    parser.add_argument("--build-seconds", type=int, default=240, help="what FlashInfer's kernels may take to compile")
    parser.add_argument("--shape-seconds", type=float, help="what the samples of a shape may take")
    parser.add_argument("--build-only", action="store_true", help="compile FlashInfer's kernels, and time nothing")
    parser.add_argument("--build", choices=paged.KERNELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only not in (None, *KINDS):
        parser.error(f"{arguments.only!r} is no kind of cache: {', '.join(KINDS)}")
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
        return paged.build(torch, arguments.build)
    if arguments.shape_seconds is not None:
        timing.SHAPE_SECONDS = arguments.shape_seconds
    torch.manual_seed(1)
    clock = Clock(torch, cuda)
    header = {
        # A name a kind: in a results file, runs of one kind each do not replace each other.
        "op": f"peers-{arguments.only}" if arguments.only else "peers",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver_version() if cuda else None,
        "date": os.environ.get("KVLAR_BENCH_DATE") or datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "clock": "CUDA events" if cuda else "wall clock",
        "torch": torch.__version__,
    }
    log = Log(arguments.out / f"{header['op']}.json", header)
    kinds = [kind for kind in KINDS if arguments.only in (None, kind)]
    flashinfer, l2 = None, 0
    paged_kinds = [kind for kind in kinds if kind in ("dense", "quantized")]
    if arguments.build_only:
        built = paged.FlashInfer(torch, log, arguments.build_seconds, paged_kinds).kernels if cuda else []
        return print(f"built: {', '.join(built) or 'none'}")
    if cuda:
        flashinfer = paged.FlashInfer(torch, log, arguments.build_seconds, paged_kinds) if paged_kinds else None
        properties = torch.cuda.get_device_properties(0)
        l2 = max(L2_BYTES, getattr(properties, "L2_cache_size", 0))
        header["copy_ceiling"] = copy_ceiling(torch, clock)
        log.ceiling = header["copy_ceiling"]["bytes_per_second"]
        log.line(f"{header['gpu']}, driver {header['driver']}, torch {torch.__version__}")
        log.line(f"copy ceiling: {log.ceiling / 1e12:.2f} TB/s")
    else:
        header["emulated"] = "the peers ran on the CPU; their times are not a speed and are left out"
        if {"dense", "quantized"} & set(kinds):
            log.skip("flashinfer", "needs a GPU")

    def budget():
        if not cuda:
            return 1 << 30
        gc.collect()  # captured closures are cycles, and hold the last shape's buffers
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] // 2

    def paged_peers(shape, kind, plans):
        return [flashinfer.peers(torch, shape, kind, plans)] if flashinfer is not None else []

    # In functions, so that a shape's buffers are gone before the next one's budget is asked for.
    def run_lowrank(rows, size, kept):
        shape = lowrank.Shape(torch, arguments.device, rows, size, kept, l2, budget())
        run_shape(torch, clock, log, shape, [lowrank.peers(torch, shape)])

    def run_dense(batch, rows):
        shape, plans = dense.Shape(torch, arguments.device, batch, rows, l2, budget()), {}
        sources = [dense.sdpa(torch, shape), dense.flex(torch, shape), *paged_peers(shape, "dense", plans)]
        run_shape(torch, clock, log, shape, sources, plans)

    def run_quantized(name, batch, rows):
        shape, plans = quantized.Shape(torch, arguments.device, name, batch, rows, l2, budget()), {}
        sources = [quantized.peers(torch, shape), *(paged_peers(shape, "quantized", plans) if name == "fp8" else [])]
        run_shape(torch, clock, log, shape, sources, plans)

    def run_scan(name, batch, rows):
        shape = scan.Shape(torch, arguments.device, name, batch, rows, l2, budget())
        run_shape(torch, clock, log, shape, [scan.peers(torch, shape)])

    def run_scores(rows, kept):
        shape = eviction.Scores(torch, arguments.device, rows, kept, l2, budget())
        run_shape(torch, clock, log, shape, [eviction.choosers(torch, shape)])

    def run_layers(layers, rows, kept):
        shape = eviction.Layers(torch, arguments.device, layers, rows, kept, l2, budget())
        run_shape(torch, clock, log, shape, [eviction.movers(torch, shape)])

    def lengths(of):
        return of.LENGTHS if cuda else (TINY,)

    if "lowrank" in kinds:
        for setting in itertools.product(lengths(lowrank), lowrank.SIZES, lowrank.KEPT):
            run_lowrank(*setting)
    if "dense" in kinds:
        for setting in itertools.product(dense.BATCHES if cuda else (1, 2), lengths(dense)):
            run_dense(*setting)
    if "quantized" in kinds:
        # Small shapes of all formats come first: what a limit cuts off is the longest.
        for batch, rows in itertools.product(quantized.BATCHES if cuda else (2,), lengths(quantized)):
            for name in quantized.FORMATS:
                run_quantized(name, batch, rows)
            for name in scan.KEYS:
                run_scan(name, batch, rows)
    if "eviction" in kinds:
        for rows in eviction.ROWS if cuda else (TINY,):
            run_scores(rows, eviction.KEPT if cuda else TINY // 4)
        for rows, kept in eviction.LENGTHS if cuda else ((TINY, TINY // 2),):
            run_layers(eviction.LAYERS if cuda else 2, rows, kept)
    log.flush(complete=True)
    print("\n" + "\n".join(log.lines) + f"\nwritten: {log.path}")


if __name__ == "__main__":
    main()
