//! encode and decode: dense rows into stored rows and back, paged.

use kvlar::{Buffer, Codec, Dtype, EncodeShape, Result, Stream, TranscodePlan};
use kvlar_bench::{Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, RowBlock, codec_name};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "encode", cases };

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Encode,
    Decode,
}

#[derive(Clone, Copy)]
struct Transcode {
    direction: Direction,
    shape: EncodeShape,
}

impl Transcode {
    /// bf16 rows with one scale each.
    fn new(direction: Direction, codec: Codec, seqs: usize, heads: usize, rows: usize) -> Self {
        let dim = 128;
        Self { direction, shape: EncodeShape { format: codec.into(), dtype: Dtype::Bf16, seqs, heads, rows, dim } }
    }

    fn rows(&self) -> usize {
        self.shape.seqs * self.shape.heads * self.shape.rows
    }

    /// Pages of one head.
    fn head_pages(&self) -> usize {
        self.shape.seqs * self.shape.heads * self.shape.rows.div_ceil(HEAD_PAGE_ROWS)
    }

    /// Of the dense side, f32 where it is decoded.
    fn dense_bytes(&self) -> usize {
        let value = if self.direction == Direction::Encode { self.shape.dtype.bytes() } else { 4 };
        self.rows() * self.shape.dim * value
    }

    fn row_bytes(&self) -> usize {
        let EncodeShape { format, dim, .. } = self.shape;
        format.row_bytes(dim) + format.params_bytes(dim)
    }
}

impl Case for Transcode {
    fn name(&self) -> String {
        let s = &self.shape;
        let direction = if self.direction == Direction::Encode { "encode" } else { "decode" };
        format!("{direction}/{}/b{}/t{}", codec_name(s.format.codec), s.seqs, s.rows)
    }

    fn parameters(&self) -> Value {
        let s = &self.shape;
        json!({
            "codec": codec_name(s.format.codec),
            "group": s.format.group_of(s.dim),
            "dense": if self.direction == Direction::Encode { s.dtype.to_string() } else { "f32".into() },
            "batch": s.seqs,
            "heads": s.heads,
            "rows": s.rows,
            "dim": s.dim,
            "page_rows": HEAD_PAGE_ROWS,
        })
    }

    fn bytes(&self) -> usize {
        self.dense_bytes() + self.rows() * self.row_bytes() + 4 * self.head_pages() / self.shape.heads
    }

    fn set_bytes(&self) -> usize {
        self.dense_bytes() + self.head_pages() * HEAD_PAGE_ROWS * self.row_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let s = &self.shape;
        let block = RowBlock::new(rig, s.format.codec, s.dim, self.head_pages());
        let set = |_| match self.direction {
            Direction::Encode => {
                let pool = self.head_pages() * HEAD_PAGE_ROWS * self.row_bytes();
                Ok((rig.normals(s.dtype, self.rows() * s.dim)?, rig.device.alloc(pool)?))
            }
            Direction::Decode => Ok((rig.poisoned(self.dense_bytes())?, block.fill(rig, self.head_pages())?)),
        };
        Ok(Box::new(Buffers {
            case: *self,
            plan: s.plan(&rig.device)?,
            pages: Pages::new(rig, &vec![s.rows; s.seqs], false)?,
            sets: (0..sets).map(set).collect::<Result<_>>()?,
        }))
    }
}

struct Buffers {
    case: Transcode,
    plan: TranscodePlan,
    pages: Pages,
    /// Dense rows and stored rows.
    sets: Vec<(Buffer, Buffer)>,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let EncodeShape { format, heads, dim, .. } = self.case.shape;
        let codec = format.codec;
        let (dense, stored) = &mut self.sets[set];
        let rows = self.pages.rows();
        match self.case.direction {
            Direction::Encode => {
                self.plan.encode(stream, dense.view(), &rows, &self.pages.pool(stored.view_mut(), heads, codec, dim), None)
            }
            Direction::Decode => {
                self.plan.decode(stream, &rows, &self.pages.pool(stored.view(), heads, codec, dim), None, &mut dense.view_mut())
            }
        }
    }

    fn check(&self, rig: &Rig) {
        let (dense, stored) = &self.sets[0];
        if self.case.direction == Direction::Decode {
            return rig.expect_finite("decode", dense);
        }
        let mut bytes = vec![0u8; stored.len().min(1 << 20)];
        rig.stream.download(stored, 0, &mut bytes).expect("a download");
        assert!(bytes.iter().any(|&x| x != 0), "encode stored nothing");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let mut all = Vec::new();
    for direction in [Direction::Encode, Direction::Decode] {
        for codec in [Codec::Bf16, Codec::F16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2] {
            if rig.wants_tiny_shapes() {
                all.push(Transcode::new(direction, codec, 2, 2, 80));
            } else {
                all.extend([(1, 4096), (1, 32768), (32, 4096)].map(|(b, t)| Transcode::new(direction, codec, b, 8, t)));
            }
        }
    }
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
