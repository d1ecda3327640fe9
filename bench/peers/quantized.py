"""Decoding over quantized keys and values as PyTorch does it today, which has no kernel for them: dequantize all rows, then
SDPA; at the shapes of benches/attend_quantized.rs, in its formats. FlashInfer's kernels for fp8 are in paged.py, scores
without values in scan.py.

Stored are random codes, not values that were quantized, and results are checked against fp64 over what the codes mean: the
kernels are compared, not the formats."""

import math

from dense import first_sdpa
from timing import DIM, KV_HEADS, Q_HEADS, attention_error, buffer_sets

BATCHES = (1, 16)
LENGTHS = (4 << 10, 32 << 10, 128 << 10)
GROUP = Q_HEADS // KV_HEADS


class Codes:
    """Integers of `bits` bits, dimension i at bit i · bits of a row, times an f16 scale plus an f16 zero; `rows` rows by
    `values` values share those. f16 holds codes and scales as they are, so engines decode to f16."""

    dtype = "float16"

    def __init__(self, bits, rows=1, values=DIM):
        self.bits, self.rows, self.values = bits, rows, values

    def bytes(self, rows):
        return rows * DIM * self.bits // 8 + 4 * (rows // self.rows) * (DIM // self.values)

    def random(self, torch, device, batch, rows):
        """Codes [B, Hk, T, bytes], scale and zero [B, Hk, T / rows, 1, d / values, 1], and shifts; values have a variance of
        some 1."""
        top = 2**self.bits - 1
        codes = torch.randint(256, (batch, KV_HEADS, rows, DIM * self.bits // 8), dtype=torch.uint8, device=device)
        size = (batch, KV_HEADS, rows // self.rows, 1, DIM // self.values, 1)
        scale = torch.empty(size, dtype=torch.float16, device=device).uniform_(0.5, 1.5) * math.sqrt(12 / (top * (top + 2)))
        zero = torch.empty_like(scale).normal_(std=0.1) - scale * (top / 2)
        return codes, scale, zero, torch.arange(0, 8, self.bits, dtype=torch.uint8, device=device)

    def decode(self, torch, codes, scale, zero, shifts):
        """[B, Hk, T, d]; to be compiled or not."""
        shape = (*codes.shape[:3], DIM)
        if self.bits < 8:
            codes = (codes[..., None] >> shifts) & (2**self.bits - 1)
        codes = codes.reshape(*scale.shape[:3], self.rows, -1, self.values)
        return torch.addcmul(zero, codes.to(scale.dtype), scale).view(shape)

    def reference(self, torch, rows, b, h):
        """Of a head, [T, d] in fp64. It shares nothing with what is timed: no shift, no broadcast."""
        codes, scale, zero = (x[b, h].double() for x in rows[:3])
        values = codes.new_empty(len(codes), DIM)
        fields = 8 // self.bits
        for i in range(fields):
            values[:, i::fields] = (codes / 2 ** (i * self.bits)).floor() % 2**self.bits
        scale, zero = (
            x[:, 0, :, 0].repeat_interleave(self.rows, 0).repeat_interleave(self.values, 1) for x in (scale, zero)
        )
        return values * scale + zero


class Fp8:
    """e4m3 times one scale."""

    dtype = "bfloat16"

    def __init__(self, scale):
        self.scale = scale

    def bytes(self, rows):
        return rows * DIM

    def random(self, torch, device, batch, rows):
        values = torch.empty(batch, KV_HEADS, rows, DIM, dtype=torch.bfloat16, device=device).normal_(std=1 / self.scale)
        return (values.to(torch.float8_e4m3fn),)

    def decode(self, torch, codes):
        values = codes.to(torch.bfloat16)
        return values if self.scale == 1 else values * self.scale

    def reference(self, torch, rows, b, h):
        return self.values_of(rows[0][b, h])

    def values_of(self, codes):
        return codes.float().double() * self.scale


# Keys and values, by the names that the benches give them. FlashInfer multiplies by a scale of values in another launch, so
# that is 1.
FORMATS = {
    "fp8": (Fp8(0.05), Fp8(1.0)),
    "int8": (Codes(8), Codes(8)),
    "int4": (Codes(4), Codes(4)),
    # KIVI (arXiv 2402.02750): keys a channel, values a row.
    "int2-channel-g32-int2-g32": (Codes(2, rows=32, values=1), Codes(2, values=32)),
}


class Shape:
    """Buffer sets of one format and shape."""

    def __init__(self, torch, device, name, batch, rows, l2, budget):
        self.torch, self.device, self.batch, self.rows = torch, device, batch, rows
        self.keys, self.values = FORMATS[name]
        self.needs = batch * KV_HEADS * (self.keys.bytes(rows) + self.values.bytes(rows))
        self.bytes = self.needs + batch * Q_HEADS * DIM * 4
        self.sets, self.cold = buffer_sets(self.needs, l2, budget)
        dtype = {"float16": "f16", "bfloat16": "bf16"}[self.keys.dtype]
        self.storage, self.name = {"codec": name, "dtype": dtype}, f"{name}/b{batch}/t{rows}"

    def allocate(self):
        def side(codec):
            return codec.random(self.torch, self.device, self.batch, self.rows)

        dtype = getattr(self.torch, self.keys.dtype)
        self.q = self.torch.empty(self.batch, Q_HEADS, DIM, dtype=dtype, device=self.device).normal_()
        self.kv = [(side(self.keys), side(self.values)) for _ in range(self.sets)]

    def elements(self, s):
        """Keys and values of e4m3 for whoever cuts them into pages."""
        return [rows[0] for rows in self.kv[s]]

    def error(self, out, k, v):
        """Of the first and the last head of sequence 0; k and v are e4m3 [rows, Hk, d] of that sequence."""

        def rows(head):
            return self.keys.values_of(k[:, head]), self.values.values_of(v[:, head])

        return max(self.head_error(out, 0, head, *rows(head)) for head in (0, KV_HEADS - 1))

    def contiguous_error(self, out):
        """Of the first head of the first sequence and the last of the last."""
        k, v = self.kv[0]
        heads = ((0, 0), (self.batch - 1, KV_HEADS - 1))
        rows = lambda at: (self.keys.reference(self.torch, k, *at), self.values.reference(self.torch, v, *at))  # noqa: E731
        return max(self.head_error(out, *at, *rows(at)) for at in heads)

    def head_error(self, out, b, head, k, v):
        out, q = (x.reshape(self.batch, KV_HEADS, GROUP, DIM)[b, head] for x in (out, self.q))
        return attention_error(out, q, k, v)


def attend_in_products(torch, q, k, v):
    """Attention for a compiler that decodes inside of the products, and writes no decoded rows. The query heads of a kv head
    are sums of their own over one decoded value."""
    q = q.view(len(q), KV_HEADS, GROUP, 1, DIM).float() / math.sqrt(DIM)
    logits = torch.stack([(q[:, :, i] * k).sum(-1) for i in range(GROUP)], 2)
    p = logits.softmax(-1)[..., None]
    return torch.stack([(p[:, :, i] * v).sum(2) for i in range(GROUP)], 2)


def peers(torch, shape):
    """What `Peer` is made of."""
    try:
        sdpa = first_sdpa(torch)
    except ImportError as e:
        yield "dequantize-sdpa", f"this torch cannot choose backends ({e})", None
        return
    # What is compiled must not hold the shape: it would outlive it, with all buffers.
    q, keys, values = shape.q[:, :, None], shape.keys, shape.values

    def decode(k, v):
        return keys.decode(torch, *k), values.decode(torch, *v)

    yield "dequantize-sdpa", lambda s: sdpa(q, *decode(*shape.kv[s])), shape.contiguous_error
    if not hasattr(torch, "compile"):
        yield "dequantize-sdpa-compiled", "this torch has no compiler", None
        return
    torch._dynamo.reset()  # a shape each: no limit on recompilations is met
    compiled = torch.compile(decode, dynamic=False, fullgraph=True)
    yield "dequantize-sdpa-compiled", lambda s: sdpa(q, *compiled(*shape.kv[s])), shape.contiguous_error

    def attend(q, k, v):
        return attend_in_products(torch, q, *decode(k, v))

    products = torch.compile(attend, dynamic=False, fullgraph=True)
    yield "products-compiled", lambda s: products(shape.q, *shape.kv[s]), shape.contiguous_error
