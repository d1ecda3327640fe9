"""Decoding over a dense bf16 cache at the shapes of benches/attend.rs: PyTorch's SDPA backends and its flex_attention.
FlashInfer's kernels for it are in paged.py."""

from timing import DIM, KV_HEADS, Q_HEADS, attention_error, buffer_sets

BATCHES = (1, 32)
LENGTHS = (4 << 10, 32 << 10, 128 << 10)


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

    def elements(self, s):
        """Keys and values for whoever cuts them into pages."""
        return self.kv[s]

    def error(self, out, k, v):
        """Of sequence 0, heads 0 and 1, against fp64; k and v are [rows, Hk, d] of that sequence."""
        out = out.reshape(self.batch, Q_HEADS, DIM)[0, :2]
        return attention_error(out, self.q[0, :2], k[:, 0], v[:, 0])


def first_sdpa(torch):
    """SDPA by the first backend that takes the inputs, which flash attention does on a GPU; an ImportError where none can be
    chosen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attend(q, k, v):
        with sdpa_kernel(backends):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


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
