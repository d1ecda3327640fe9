//! score: windows, whole columns and repeated chunks, Llama-3.1-8B's heads, paged.

use kvlar::{Buffer, Codec, Dtype, Pooling, Result, ScoreArgs, ScorePlan, ScoreShape, ScoredRows, Stream, Workspace};
use kvlar_bench::{Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, RowBlock};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "score", cases };

#[derive(Clone)]
struct Score {
    kind: &'static str,
    shape: ScoreShape,
}

impl Score {
    /// Queries of the last rows.
    fn window(seqs: usize, heads: (usize, usize), window: usize, rows: usize, given_lse: bool) -> Self {
        Self {
            kind: "window",
            shape: ScoreShape { given_lse, ..ScoreShape::window(Dtype::Bf16, seqs, heads, window, rows, 128) },
        }
    }

    /// A step of decode: one query, running sums.
    fn step(seqs: usize, heads: (usize, usize), rows: usize) -> Self {
        let window = Self::window(seqs, heads, 1, rows, true).shape;
        let (scored, pool) = (ScoredRows::All, Pooling::None);
        Self { kind: "step", shape: ScoreShape { scored, pool, accumulate: Some(0.98), ..window } }
    }

    fn column(heads: (usize, usize), rows: usize) -> Self {
        Self { kind: "column", shape: ScoreShape::column(Dtype::Bf16, 1, heads, rows, 128) }
    }

    /// A chunk behind as many rows, and as many queries that repeat it.
    fn repeat(heads: (usize, usize), chunk: usize) -> Self {
        Self { kind: "repeat", shape: ScoreShape::repeat(Dtype::Bf16, 1, heads, chunk, chunk, 3 * chunk, 128) }
    }

    fn lengths(&self) -> Vec<usize> {
        vec![self.shape.rows; self.shape.seqs]
    }

    fn head_pages(&self) -> usize {
        self.shape.seqs * self.shape.kv_heads * self.shape.rows.div_ceil(HEAD_PAGE_ROWS)
    }
}

impl Case for Score {
    fn name(&self) -> String {
        let s = &self.shape;
        let lse = if s.given_lse { "/lse" } else { "" };
        format!("{}/b{}/w{}/t{}{lse}", self.kind, s.seqs, s.queries, s.rows)
    }

    fn parameters(&self) -> Value {
        let s = &self.shape;
        json!({
            "kind": self.kind,
            "batch": s.seqs,
            "queries": s.queries,
            "rows": s.rows,
            "q_heads": s.q_heads,
            "kv_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "page_rows": HEAD_PAGE_ROWS,
            "given_lse": s.given_lse,
        })
    }

    /// Keys once, queries, and scores: what a second pass reads again is no must.
    fn bytes(&self) -> usize {
        let s = &self.shape;
        let rows = if let ScoredRows::Chunk(chunk) = s.scored { chunk + s.queries } else { s.rows };
        let (heads, queries) = (s.seqs * s.kv_heads, s.seqs * s.q_heads * s.queries);
        2 * s.head_dim * (heads * rows + queries) + 4 * heads * s.columns()
    }

    fn set_bytes(&self) -> usize {
        self.head_pages() * HEAD_PAGE_ROWS * 2 * self.shape.head_dim
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (s, pages) = (&self.shape, self.head_pages());
        let plan = s.plan(&rig.device)?;
        let block = RowBlock::new(rig, Codec::Bf16, s.head_dim, pages);
        let queries = s.seqs * s.q_heads * s.queries;
        let chunk = s.columns() as i32;
        let mut scores = rig.device.alloc(4 * s.seqs * s.kv_heads * s.columns())?;
        let all = 0..scores.len();
        // Running sums begin with what is there.
        rig.stream.fill(&mut scores, all, if s.accumulate.is_some() { 0 } else { 0xff })?;
        let mut buffers = Buffers {
            case: self.clone(),
            plan,
            q: rig.normals(Dtype::Bf16, queries * s.head_dim)?,
            // Of standard normal logits.
            lse: if s.given_lse { Some(rig.upload(&vec![(s.rows as f32).ln() + 0.5; queries])?) } else { None },
            spans: match s.scored {
                ScoredRows::Chunk(_) => Some(rig.upload(&[0, chunk, chunk].repeat(s.seqs))?),
                _ => None,
            },
            scores,
            pages: Pages::new(rig, &self.lengths(), false)?,
            caches: (0..sets).map(|_| block.fill(rig, pages)).collect::<Result<_>>()?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        };
        buffers.launch(&rig.stream, 0)?;
        Ok(Box::new(buffers))
    }
}

struct Buffers {
    case: Score,
    plan: ScorePlan,
    q: Buffer,
    lse: Option<Buffer>,
    spans: Option<Buffer>,
    scores: Buffer,
    pages: Pages,
    /// Keys of each set.
    caches: Vec<Buffer>,
    workspace: Workspace,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let s = &self.case.shape;
        let keys = self.pages.pool(self.caches[set].view(), s.kv_heads, Codec::Bf16, s.head_dim);
        let mut rows = self.pages.rows();
        rows.max_rows = rows.max_rows.min(s.rows);
        let mut args = ScoreArgs {
            given_lse: self.lse.as_ref().map(Buffer::view),
            spans: self.spans.as_ref().map(Buffer::view),
            ..ScoreArgs::new(self.q.view(), rows, keys, self.scores.view_mut())
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("scores", &self.scores);
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "score: {status:?}");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let all = if rig.wants_tiny_shapes() {
        let heads = (4, 2);
        vec![
            Score::window(1, heads, 8, 192, false),
            Score::window(1, heads, 8, 192, true),
            Score::step(1, heads, 192),
            Score::column(heads, 128),
            Score::repeat(heads, 64),
        ]
    } else {
        let heads = (32, 8);
        let mut all = Vec::new();
        for t in [4 << 10, 32 << 10, 128 << 10] {
            for window in [1, 8, 32, 64] {
                all.extend([false, true].map(|lse| Score::window(1, heads, window, t, lse)));
            }
            all.push(Score::step(1, heads, t));
        }
        all.push(Score::window(16, heads, 32, 32 << 10, false));
        // A prompt of H2O, a chunk of KVzip.
        all.extend([4 << 10, 32 << 10].map(|t| Score::column(heads, t)));
        all.push(Score::repeat(heads, 2048));
        all
    };
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
