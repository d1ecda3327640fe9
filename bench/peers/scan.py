"""Scores without values, one a cached row and kv head (the largest product with a query of its group), as PyTorch makes them
today; at shapes of benches/scan.rs, over bf16 keys, quantized ones, and product codes."""

import functools

from quantized import FORMATS, GROUP
from timing import DIM, KV_HEADS, Q_HEADS, buffer_sets


class Bf16:
    """Keys as they are."""

    dtype, tables = "bfloat16", 0

    def bytes(self, rows):
        return rows * DIM * 2

    def random(self, torch, device, batch, rows):
        return (torch.empty(batch, KV_HEADS, rows, DIM, dtype=torch.bfloat16, device=device).normal_(),)

    def decode(self, torch, keys):
        return keys

    def reference(self, torch, rows, b, h):
        return rows[0][b, h].double()


class ProductCodes:
    """A byte a pair of dimensions: which of 256 centroids; those of a kv head are shared by all sequences, in f32."""

    dtype, width, centroids = "bfloat16", 2, 256
    tables = KV_HEADS * centroids * DIM * 4

    def bytes(self, rows):
        return rows * (DIM // self.width)

    def random(self, torch, device, batch, rows):
        size = (KV_HEADS, DIM // self.width, self.centroids, self.width)
        codes = torch.randint(256, (batch, KV_HEADS, rows, size[1]), dtype=torch.uint8, device=device)
        return codes, torch.empty(size, device=device).normal_()

    def reference(self, torch, rows, b, h):
        codes, tables = rows[0][b, h].long(), rows[1][h].double()
        return torch.cat([tables[m, codes[:, m]] for m in range(len(tables))], -1)


KEYS = {"bf16": Bf16(), "int8": FORMATS["int8"][0], "int4": FORMATS["int4"][0], "pq64x256-random": ProductCodes()}


class Shape:
    """Buffer sets of one format of keys."""

    def __init__(self, torch, device, name, batch, rows, l2, budget):
        self.torch, self.device, self.batch, self.rows = torch, device, batch, rows
        self.keys = KEYS[name]
        tables = getattr(self.keys, "tables", 0)
        self.needs = batch * KV_HEADS * self.keys.bytes(rows) + tables
        # Scores in 32 bits, as the bench writes them: one byte count for all.
        self.bytes = self.needs + batch * KV_HEADS * rows * 4 + batch * Q_HEADS * DIM * 2
        self.sets, self.cold = buffer_sets(self.needs, l2, budget)
        dtype = {"float16": "f16", "bfloat16": "bf16"}[self.keys.dtype]
        self.storage, self.name = {"codec": name, "dtype": dtype, "op": "scan"}, f"{name}/b{batch}/t{rows}"

    def allocate(self):
        dtype = getattr(self.torch, self.keys.dtype)
        self.q = self.torch.empty(self.batch, KV_HEADS, GROUP, DIM, dtype=dtype, device=self.device).normal_()
        self.sides = [self.keys.random(self.torch, self.device, self.batch, self.rows) for _ in range(self.sets)]

    def error(self, scores):
        """Of the first head of the first sequence and the last of the last; scores are [B, Hk, T]."""
        wrong = []
        for b, head in ((0, 0), (self.batch - 1, KV_HEADS - 1)):
            k = self.keys.reference(self.torch, self.sides[0], b, head)
            reference = (self.q[b, head].double() @ k.T).amax(0)
            wrong.append(((scores[b, head].double() - reference).norm() / reference.norm()).item())
        return max(wrong)


def largest(torch, heads):
    """Of a group's scores, each [B, Hk, T]."""
    return functools.reduce(torch.maximum, heads)


def products(torch, q, k):
    """For a compiler that decodes keys inside of the products: a sum a query head over one decoded value."""
    return largest(torch, [(q[:, :, i, None].float() * k).sum(-1) for i in range(GROUP)])


def lookups(torch, q, codes, tables):
    """A table of products a query head, then a sum of its entries a row."""
    heads, subvectors, centroids, width = tables.shape
    q = q.float().view(len(q), heads, GROUP, subvectors, width)
    products = torch.einsum("bhgmw,hmcw->bhgmc", q, tables).flatten(-2)
    entries = codes.long() + torch.arange(subvectors, device=codes.device) * centroids
    entries = entries.flatten(2)  # gather wants 8 bytes an index
    return largest(torch, [products[:, :, i].gather(-1, entries).view(codes.shape).sum(-1) for i in range(GROUP)])


def peers(torch, shape):
    """What `Peer` is made of."""
    keys = shape.keys  # what is compiled must not hold the shape

    def matmul(q, *rows):
        return (q @ keys.decode(torch, *rows).transpose(-1, -2)).amax(2)

    def decoded_products(q, *rows):
        return products(torch, q, keys.decode(torch, *rows))

    def gather(q, *rows):
        return lookups(torch, q, *rows)

    by_lookup = isinstance(keys, ProductCodes)
    eager, inlined = (gather, gather) if by_lookup else (matmul, decoded_products)
    name = "scan-gather" if by_lookup else "scan-matmul"
    yield name, lambda s: eager(shape.q, *shape.sides[s]), shape.error
    name = "scan-gather-compiled" if by_lookup else "scan-products-compiled"
    if not hasattr(torch, "compile"):
        yield name, "this torch has no compiler", None
        return
    torch._dynamo.reset()  # a shape each: no limit on recompilations is met
    compiled = torch.compile(inlined, dynamic=False, fullgraph=True)
    yield name, lambda s: compiled(shape.q, *shape.sides[s]), shape.error
