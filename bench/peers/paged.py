"""FlashInfer's decode over paged caches in bf16 (dense.Shape) or e4m3 (quantized.Shape), pages in random order."""

import importlib
import math
import os
import subprocess
import sys
import time
from typing import NamedTuple

import dense
import quantized
from timing import DIM, KV_HEADS, Q_HEADS, TOLERANCE, Peer, first_line

PAGES = (16, 64)
LAYOUTS = ("NHD", "HND")
WORKSPACE_BYTES = 256 << 20
# Of kernels that round queries and probabilities to e4m3: some 2.6 % each, 3.7 % together.
E4M3_TOLERANCE = 8e-2


class Kernel(NamedTuple):
    kind: str  # of cache
    backend: str
    tensor_cores: bool = True
    e4m3_queries: bool = False  # given to it; rounded before anything is timed
    pages: tuple = PAGES


KERNELS = {
    "cuda-cores": Kernel("dense", "fa2", tensor_cores=False),
    "fa2": Kernel("dense", "fa2"),
    "fa3": Kernel("dense", "fa3"),
    "fp8-fa2": Kernel("quantized", "fa2"),
    "fp8-fa3": Kernel("quantized", "fa3", e4m3_queries=True),  # it has no other queries over an e4m3 cache
    "fp8-xqa": Kernel("quantized", "xqa", pages=PAGES[-1:]),  # rounds bf16 queries itself; compiled for one size of pages
}


class Pages:
    """Where the pages of a shape are: sequence b has those of row b of `table`."""

    def __init__(self, torch, shape, page, layout):
        self.torch, self.page, self.layout, self.count = torch, page, layout, shape.rows // page
        self.table = torch.randperm(shape.batch * self.count, device="cuda").to(torch.int32).view(shape.batch, -1)
        self.size = (-1, page, KV_HEADS, DIM) if layout == "NHD" else (-1, KV_HEADS, page, DIM)

    def cut(self, elements):
        """Keys and values, in pages."""
        return tuple(x.view(self.size) for x in elements)

    def rows(self, elements):
        """Of sequence 0, [rows, Hk, d]."""
        for x in self.cut(elements):
            indexed = x.view(self.torch.uint8) if x.element_size() == 1 else x  # fp8 is not indexed everywhere
            x = indexed[self.table[0].long()].view(x.dtype)
            yield (x if self.layout == "NHD" else x.transpose(1, 2)).reshape(-1, KV_HEADS, DIM)


def wrapper_launch(torch, shape, kernel, workspace, pages):
    """A launch of a planned wrapper, and what planning took on the host."""
    import flashinfer

    # Its own graph mode pads the grid for lengths to come; a capture of a plan that stays is at least as fast.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, pages.layout, use_tensor_cores=kernel.tensor_cores, backend=kernel.backend
    )
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages.count
    last = torch.full((shape.batch,), pages.page, dtype=torch.int32, device="cuda")
    q, scales, out = shape.q, (), torch.empty_like(shape.q)
    options = {}
    if kernel.kind == "quantized":
        # A scale of values that is not 1 would cost a launch of its own.
        k_scale, v_scale = shape.keys.scale, shape.values.scale
        options = {"k_scale": k_scale, "v_scale": v_scale}
    if kernel.e4m3_queries:
        q = q.to(torch.float8_e4m3fn)
        full = lambda heads, x: torch.full((heads,), x, dtype=torch.float32, device="cuda")  # noqa: E731
        scales, options = (full(Q_HEADS, 1.0), full(KV_HEADS, k_scale), full(KV_HEADS, v_scale)), {}
    types = {"q_data_type": q.dtype, "kv_data_type": shape.elements(0)[0].dtype, "o_data_type": out.dtype}
    torch.cuda.synchronize()
    start = time.perf_counter()
    wrapper.plan(indptr, pages.table.flatten(), last, Q_HEADS, KV_HEADS, DIM, pages.page, **types)
    torch.cuda.synchronize()
    plan_seconds = time.perf_counter() - start

    def launch(s):
        return wrapper.run(q, pages.cut(shape.elements(s)), *scales, out=out, **options)

    return launch, plan_seconds


def xqa_launch(torch, shape, workspace, pages):
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    lengths = torch.full((shape.batch,), shape.rows, dtype=torch.int32, device="cuda").view(torch.uint32)
    out = torch.empty_like(shape.q)
    options = {"bmm1_scale": shape.keys.scale / math.sqrt(DIM), "bmm2_scale": shape.values.scale, "kv_layout": pages.layout}

    def launch(s):
        return xqa_batch_decode_with_kv_cache(
            shape.q, pages.cut(shape.elements(s)), workspace, pages.table, lengths, shape.rows, out=out, **options
        )

    return launch, None


def peer(torch, shape, workspaces, name, page, layout):
    """A peer, and what it takes to plan, if it plans."""
    kernel, pages = KERNELS[name], Pages(torch, shape, page, layout)
    # Workspaces start as zeros, and some stay what their last user made of them: a backend has its own.
    if kernel.backend not in workspaces:
        workspaces[kernel.backend] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    workspace = workspaces[kernel.backend]
    if kernel.backend == "xqa":
        launch, plan_seconds = xqa_launch(torch, shape, workspace, pages)
    else:
        launch, plan_seconds = wrapper_launch(torch, shape, kernel, workspace, pages)
    rounds = kernel.e4m3_queries or kernel.backend == "xqa"

    def error(out):
        return shape.error(out, *pages.rows(shape.elements(0)))

    full_name = f"flashinfer-{name}/page{page}/{layout.lower()}"
    return Peer(full_name, launch, error, E4M3_TOLERANCE if rounds else TOLERANCE), plan_seconds


class FlashInfer:
    """Which of its kernels for some kinds of caches can be built here; building is what takes long."""

    def __init__(self, torch, log, seconds, kinds):
        self.kernels, self.workspaces = [], {}
        try:
            version = importlib.import_module("flashinfer").__version__
        except Exception as e:
            log.skip("flashinfer", f"not importable ({first_line(e)})")
            return
        wanted = [name for name, kernel in KERNELS.items() if kernel.kind in kinds]
        print(f"flashinfer {version}: building kernels, up to {seconds} s", flush=True)
        command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "peers.py"), "--build"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children = {name: subprocess.Popen([*command, name], **pipes) for name in wanted}
        deadline = time.monotonic() + seconds
        for name, child in children.items():
            try:
                text, _ = child.communicate(timeout=max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
                log.skip(f"flashinfer-{name}", f"not built within {seconds} s")
                continue
            if child.returncode == 0:
                self.kernels.append(name)
            else:
                last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
                log.skip(f"flashinfer-{name}", f"does not run here: {last[0][:200]}")

    def peers(self, torch, shape, kind, plans):
        for name in self.kernels:
            if KERNELS[name].kind != kind:
                continue
            for page in KERNELS[name].pages:
                for layout in LAYOUTS:
                    try:
                        made, seconds = peer(torch, shape, self.workspaces, name, page, layout)
                    except Exception as e:
                        yield f"flashinfer-{name}/page{page}/{layout.lower()}", first_line(e), None
                        continue
                    if seconds is not None:
                        plans[made.name] = seconds
                    yield made


def build(torch, name):
    """A child's work: one tiny launch, which compiles and loads the kernel."""
    if KERNELS[name].kind == "quantized":
        shape = quantized.Shape(torch, "cuda", "fp8", 1, 256, 0, 1 << 30)
    else:
        shape = dense.Shape(torch, "cuda", 1, 256, 0, 1 << 30)
    shape.allocate()
    made, _ = peer(torch, shape, {}, name, KERNELS[name].pages[0], LAYOUTS[0])
    wrong = made.error(made.launch(0))
    if not wrong < made.tolerance:
        sys.exit(f"wrong result: relative error {wrong:.1e}")
