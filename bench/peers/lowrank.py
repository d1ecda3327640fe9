"""Decoding over low-rank keys and values as PyTorch does it today: rebuild all rows, rotate the keys, then SDPA; at the
shapes of benches/attend_lowrank.rs."""

import math

from dense import first_sdpa
from timing import DIM, KV_HEADS, Q_HEADS, buffer_sets

SIZES = (1, 2, 4, 8)  # kv heads a group
KEPT = (0.25, 0.5)  # latents, of the bytes of dense rows
LENGTHS = (32 << 10, 128 << 10)
RANK_MULTIPLE = 32
THETA = 500_000.0


class Shape:
    """Buffer sets of one setting, keys and values alike: latents [T, groups, r] and bases [Hk, d, r]. Bases belong to the
    sets, since every layer has its own; the angles of all rows are computed beforehand and shared."""

    batch = 1

    def __init__(self, torch, device, rows, size, kept, l2, budget):
        self.torch, self.device, self.rows, self.size = torch, device, rows, size
        self.groups = KV_HEADS // size
        self.rank = RANK_MULTIPLE * math.ceil(kept * size * DIM / RANK_MULTIPLE)
        latents, bases = 2 * rows * self.groups * self.rank * 2, 2 * KV_HEADS * DIM * self.rank * 2
        self.needs = latents + bases
        self.bytes = self.needs + Q_HEADS * DIM * 4
        self.sets, self.cold = buffer_sets(self.needs, l2, budget)
        self.storage = {"latents": "bf16", "group_size": size, "key_rank": self.rank, "value_rank": self.rank}
        self.name = f"g{size}-r{self.rank}/bf16/b1/t{rows}"

    def allocate(self):
        torch = self.torch

        def normal(scale, *size):
            return torch.empty(*size, dtype=torch.bfloat16, device=self.device).normal_(std=scale)

        def side():
            return normal(1, self.rows, self.groups, self.rank), normal(self.rank**-0.5, KV_HEADS, DIM, self.rank)

        self.q = normal(1, 1, Q_HEADS, 1, DIM)
        self.kv = [(side(), side()) for _ in range(self.sets)]
        cos, sin = self.angles()
        self.cos, self.sin = (x.to(torch.bfloat16)[:, None] for x in (cos, sin))

    def angles(self):
        """Cosines and sines [T, d/2], fp64."""
        arange = lambda n: self.torch.arange(n, dtype=self.torch.float64, device=self.device)  # noqa: E731
        angles = arange(self.rows)[:, None] * THETA ** (-arange(DIM // 2) * 2 / DIM)
        return angles.cos(), angles.sin()

    def error(self, out):
        """Of one query head of the first kv head and one of the last, against fp64."""
        turn = [x[:, None] for x in self.angles()]
        wrong = []
        for head in (0, KV_HEADS - 1):
            k, v = (z[:, head // self.size].double() @ basis[head].double().T for z, basis in self.kv[0])
            k = rotate(self.torch, k[:, None], *turn)[:, 0]
            query = head * (Q_HEADS // KV_HEADS)
            logits = k @ self.q[0, query, 0].double() / math.sqrt(DIM)
            reference = logits.softmax(-1) @ v
            wrong.append(((out[0, query, 0].double() - reference).norm() / reference.norm()).item())
        return max(wrong)


def rebuild(torch, z, basis):
    """[T, groups, r] and [Hk, d, r] to [T, Hk, d]: one product a group, written where attention reads it."""
    rows, groups, rank = z.shape
    heads = basis.view(groups, -1, rank).transpose(1, 2)
    out = z.new_empty(rows, groups, heads.shape[2])
    torch.bmm(z.transpose(0, 1), heads, out=out.transpose(0, 1))
    return out.view(rows, -1, basis.shape[1])


def rotate(torch, k, cos, sin):
    """RoPE of [T, Hk, d] in the half layout; cos and sin are [T, 1, d/2]."""
    low, high = k.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def rotated_keys(torch, z, basis, cos, sin):
    """`rebuild` and `rotate` for a compiler, which decides itself where intermediate results go."""
    rows, groups, rank = z.shape
    k = torch.einsum("tnr,ncr->tnc", z, basis.view(groups, -1, rank))
    return rotate(torch, k.reshape(rows, -1, basis.shape[1]), cos, sin)


def peers(torch, shape):
    """(name, launch, error) of each; where there is none, a reason in the place of launch."""
    try:
        sdpa = first_sdpa(torch)
    except ImportError as e:
        yield "rebuild-sdpa", f"this torch cannot choose backends ({e})", None
        return

    def attend(k, v):
        return sdpa(shape.q, *(x.transpose(0, 1)[None] for x in (k, v)))

    def eager(s):
        (zk, uk), (zv, uv) = shape.kv[s]
        return attend(rotate(torch, rebuild(torch, zk, uk), shape.cos, shape.sin), rebuild(torch, zv, uv))

    yield "rebuild-sdpa", eager, shape.error
    if not hasattr(torch, "compile"):
        yield "rebuild-sdpa-compiled", "this torch has no compiler", None
        return
    torch._dynamo.reset()  # a shape each: no limit on recompilations is met
    compiled = torch.compile(lambda *tensors: rotated_keys(torch, *tensors), dynamic=False)

    def launch(s):
        (zk, uk), (zv, uv) = shape.kv[s]
        return attend(compiled(zk, uk, shape.cos, shape.sin), rebuild(torch, zv, uv))

    yield "rebuild-sdpa-compiled", launch, shape.error
