"""Choosing rows and moving them together as it is done today, at the shapes of benches/select.rs and benches/compact.rs:
PyTorch's topk and FlashInfer's top_k; copies of the kept rows by PyTorch's gather, index_select and boolean masks, a layer at a
time; and a scorer by key norms with topk and gather behind it, as the presses of kvpress do it (its published behaviour, in
our words). None of them moves rows in place: what is left is a copy, beside the rows it was made from."""

import functools

from timing import DIM, KV_HEADS, buffer_sets

KEPT = 2048
ROWS = (4 << 10, 16 << 10, 32 << 10, 128 << 10, 1 << 20)  # of scores
LAYERS = 32  # of Llama-3.1-8B
LENGTHS = ((32 << 10, 16 << 10), (128 << 10, 64 << 10), (128 << 10, 2048))  # rows, and how many of them are left
EXACT = 1e-6


class Scores:
    """Rows of fp32 scores, of which each keeps its largest."""

    def __init__(self, torch, device, rows, kept, l2, budget):
        self.torch, self.device, self.batch, self.rows, self.kept = torch, device, 1, rows, kept
        self.needs = KV_HEADS * rows * 4
        self.bytes = self.needs + KV_HEADS * kept * 4
        self.sets, self.cold = buffer_sets(self.needs, l2, budget)
        self.storage, self.name = {"op": "topk", "dtype": "f32", "k": kept}, f"topk/h{KV_HEADS}/t{rows}/k{kept}"

    def allocate(self):
        def normal():
            return self.torch.empty(KV_HEADS, self.rows, device=self.device).normal_()

        self.scores = [normal() for _ in range(self.sets)]

    def error(self, indices):
        """Of the scores that were chosen, in their order of size; 1 where a row is chosen twice."""
        scores, indices = self.scores[0].double(), indices.long()
        if any(len(row.unique()) != self.kept for row in indices):
            return 1.0
        chosen = scores.gather(1, indices).sort(descending=True).values
        best = scores.sort(descending=True).values[:, : self.kept]
        return ((chosen - best).norm() / best.norm()).item()


def choosers(torch, shape):
    """What `Peer` is made of, for `Scores`."""
    for name, is_sorted in (("torch-topk", False), ("torch-topk-sorted", True)):
        chosen = functools.partial(torch.topk, k=shape.kept, sorted=is_sorted)
        yield name, lambda s, chosen=chosen: chosen(shape.scores[s]).indices, shape.error, EXACT
    try:
        import flashinfer
    except Exception as e:
        yield "flashinfer-top-k", f"flashinfer is not importable ({type(e).__name__})", None
        return
    top_k = getattr(flashinfer, "top_k", None)
    if top_k is None or shape.device != "cuda":
        yield "flashinfer-top-k", "this flashinfer does not have it" if top_k is None else "needs a GPU", None
        return
    yield "flashinfer-top-k", lambda s: top_k(shape.scores[s], shape.kept)[1], shape.error, EXACT
    # Ties in one order on every run, as ours are.
    yield (
        "flashinfer-top-k-deterministic",
        lambda s: top_k(shape.scores[s], shape.kept, deterministic=True)[1],
        shape.error,
        EXACT,
    )


class Layers:
    """bf16 keys and values of all layers, each [Hk, T, d], and which rows of each head are kept."""

    def __init__(self, torch, device, layers, rows, kept, l2, budget):
        self.torch, self.device, self.layers = torch, device, layers
        self.batch, self.rows, self.kept = 1, rows, kept
        row = 2 * DIM * 2
        # What a copy leaves beside the rows counts as room, and as written; ours have no such copy.
        self.needs = layers * KV_HEADS * (rows + kept) * row
        self.bytes = layers * KV_HEADS * (2 * kept * row + rows)
        self.sets, self.cold = buffer_sets(self.needs, l2, budget)
        self.storage = {"op": "compact", "layers": layers, "kept": kept, "codec": "bf16"}
        self.name = f"compact/l{layers}h{KV_HEADS}/t{rows}/k{kept}"

    def allocate(self):
        def normal():
            return self.torch.empty(KV_HEADS, self.rows, DIM, dtype=self.torch.bfloat16, device=self.device).normal_()

        self.kv = [[(normal(), normal()) for _ in range(self.layers)] for _ in range(self.sets)]
        noise = self.torch.rand(KV_HEADS, self.rows, device=self.device)
        self.index = noise.topk(self.kept).indices.sort().values
        self.mask = self.torch.zeros_like(noise, dtype=self.torch.bool).scatter_(1, self.index, True)

    def error(self, out):
        """Of the first head of the first layer and the last of the last, where rows stay in order."""
        wrong = 0.0
        for layer, head in ((0, 0), (self.layers - 1, KV_HEADS - 1)):
            rows = [row for row, kept in enumerate(self.mask[head].tolist()) if kept]
            for kept, full in zip(out[layer], self.kv[0][layer]):
                kept, expected = kept.reshape(KV_HEADS, self.kept, DIM)[head].double(), full[head][rows].double()
                wrong = max(wrong, ((kept - expected).norm() / expected.norm()).item())
        return wrong

    def press_error(self, out):
        """Of the norms of the keys that are left, in their order of size; 1 where a value is not that of its key."""
        wrong = 0.0
        for layer, head in ((0, 0), (self.layers - 1, KV_HEADS - 1)):
            (k, v), (full_k, full_v) = ([x[head].double() for x in pair] for pair in (out[layer], self.kv[0][layer]))
            least = full_k.norm(dim=1).sort().values[: self.kept]
            wrong = max(wrong, ((k.norm(dim=1).sort().values - least).norm() / least.norm()).item())
            for i in range(0, self.kept, max(1, self.kept // 16)):
                row = (full_k == k[i]).all(1).nonzero()[0, 0]
                wrong = max(wrong, 0.0 if self.torch.equal(full_v[row], v[i]) else 1.0)
        return wrong


def gathered(x, index):
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def pressed(torch, k, v, kept):
    """The rows with the least norms of keys, in no order."""
    scores = -torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32)
    index = scores.topk(kept, dim=-1).indices
    return gathered(k, index), gathered(v, index)


def movers(torch, shape):
    """What `Peer` is made of, for `Layers`."""
    index, mask = shape.index, shape.mask
    flat = (index + torch.arange(KV_HEADS, device=index.device)[:, None] * shape.rows).flatten()

    def each(of):
        return lambda s: [(of(k), of(v)) for k, v in shape.kv[s]]

    yield "torch-gather", each(lambda x: gathered(x, index)), shape.error, EXACT
    yield "torch-index-select", each(lambda x: x.flatten(0, 1).index_select(0, flat)), shape.error, EXACT
    # The one that heads of different lengths can use; it waits for the device to know how many rows are left.
    yield "torch-mask", each(lambda x: x[mask]), shape.error, EXACT
    yield "press-norm", lambda s: [pressed(torch, k, v, shape.kept) for k, v in shape.kv[s]], shape.press_error, 1e-3
