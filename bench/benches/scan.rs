//! scan: one score a cached row and kv head, Llama-3.1-8B's heads, paged. Scores alone are written, unless the name says so.
//!
//! Product codes are random, all equal (lanes of a warp read one entry), or 32 apart (their entries meet in one bank): what
//! lookups cost lies between the last two.

use kvlar::{
    Buffer, Codec, Dtype, Format, Reduction, Result, ScanArgs, ScanPlan, ScanSelectPlan, ScanSelectShape, ScanShape, SelectArgs,
    Stream, WorkList, Workspace,
};
use kvlar_bench::{Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, RowBlock, codec_name};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "scan", cases };

#[derive(Clone, Copy, Debug, PartialEq)]
enum Codes {
    Random,
    Equal,
    Conflicting,
}

#[derive(Clone)]
struct Scan {
    keys: Format,
    codes: Codes,
    method: Reduction,
    histogram: bool,
    /// How many rows a head's cut keeps, where it is found too.
    select: Option<usize>,
    lengths: Vec<usize>,
    /// (Hq, Hk)
    heads: (usize, usize),
    dim: usize,
}

impl Scan {
    fn new(keys: impl Into<Format>, lengths: Vec<usize>) -> Self {
        let (method, codes) = (Reduction::MaxLogit, Codes::Random);
        Self { keys: keys.into(), codes, method, histogram: false, select: None, lengths, heads: (32, 8), dim: 128 }
    }

    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Pages of one head.
    fn head_pages(&self) -> usize {
        self.lengths.len() * self.longest().div_ceil(HEAD_PAGE_ROWS) * self.heads.1
    }

    fn row_bytes(&self) -> usize {
        self.keys.row_bytes(self.dim) + self.keys.params_bytes(self.dim)
    }

    /// `pq64x256-equal`, `int4+hadamard`.
    fn format_name(&self) -> String {
        let (f, rotated) = (self.keys, if self.keys.hadamard { "+hadamard" } else { "" });
        if f.codec != Codec::Pq {
            return format!("{}{rotated}", codec_name(f.codec));
        }
        let codes = format!("{:?}", self.codes).to_lowercase();
        format!("pq{}x{}-{codes}{rotated}", self.dim / f.group_of(self.dim), f.centroids)
    }

    fn shape(&self) -> ScanShape {
        let rows = self.longest().next_multiple_of(HEAD_PAGE_ROWS);
        ScanShape {
            scores: Some(self.method),
            histogram: self.histogram,
            ..ScanShape::new(Dtype::Bf16, self.lengths.len(), self.heads, self.dim, self.keys, rows)
        }
    }
}

impl Case for Scan {
    fn name(&self) -> String {
        let (b, t) = (self.lengths.len(), self.longest());
        let method = if self.method == Reduction::MaxProb { "/max_prob" } else { "" };
        let histogram = if self.histogram { "/histogram" } else { "" };
        let select = self.select.map_or(String::new(), |k| format!("/select{k}"));
        format!("{}/b{b}/t{t}{method}{histogram}{select}", self.format_name())
    }

    fn parameters(&self) -> Value {
        json!({
            "codec": self.format_name(),
            "batch": self.lengths.len(),
            "rows": self.lengths.iter().sum::<usize>(),
            "longest": self.longest(),
            "q_heads": self.heads.0,
            "kv_heads": self.heads.1,
            "head_dim": self.dim,
            "page_rows": HEAD_PAGE_ROWS,
            "method": format!("{:?}", self.method),
            "histogram": self.histogram,
            "select": self.select,
        })
    }

    /// Keys, tables, queries and scores: logits that a second launch reads are no must.
    fn bytes(&self) -> usize {
        let rows: usize = self.lengths.iter().sum();
        let pages: usize = self.lengths.iter().map(|n| n.div_ceil(HEAD_PAGE_ROWS)).sum();
        let queries = 2 * self.lengths.len() * self.heads.0 * self.dim;
        rows * self.heads.1 * (self.row_bytes() + 4) + 4 * pages + queries + self.keys.codebook_bytes(self.heads.1, self.dim)
    }

    fn set_bytes(&self) -> usize {
        self.head_pages() * HEAD_PAGE_ROWS * self.row_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (device, pages) = (&rig.device, self.head_pages());
        let select = self.select.map(|k| ScanSelectShape::new(self.shape(), k).plan(device)).transpose()?;
        let plan = if let Some(select) = &select { *select.scan() } else { self.shape().plan(device)? };
        let size = select.map_or(plan.workspace(), |select| select.workspace());
        let block = if self.keys.codec == Codec::Pq {
            let code = |row: usize, _: usize| match self.codes {
                Codes::Random => rig.with_rng(|rng| rng.below(self.keys.centroids)) as u8,
                Codes::Equal => 77,
                Codes::Conflicting => (row * 32 % self.keys.centroids) as u8,
            };
            RowBlock::of_codes(self.dim / self.keys.group_of(self.dim), pages, code)
        } else {
            RowBlock::new(rig, self.keys.codec, self.dim, pages)
        };
        let books = self.keys.codebook_bytes(self.heads.1, self.dim);
        let (b, rows) = (self.lengths.len(), self.shape().rows);
        let mut buffers = Buffers {
            case: self.clone(),
            plan,
            q: rig.normals(Dtype::Bf16, b * self.heads.0 * self.dim)?,
            tables: if books > 0 { Some(rig.normals(Dtype::F32, books / 4)?) } else { None },
            scores: rig.poisoned(4 * b * self.heads.1 * rows)?,
            histogram: if self.histogram { Some(rig.poisoned(4 * b * self.heads.1 * kvlar::SCORE_BINS)?) } else { None },
            pages: Pages::new(rig, &self.lengths, false)?,
            caches: (0..sets).map(|_| block.fill(rig, pages)).collect::<Result<_>>()?,
            work: plan.work_list(device)?,
            workspace: Workspace::new(device, size)?,
            select,
            cuts: rig.poisoned(8 * b * self.heads.1)?,
        };
        // The list depends on the lengths alone: one serves all sets, as in an engine it serves all layers.
        buffers.with_args(0, |plan, _, args, work, workspace| plan.schedule(&rig.stream, args, work, workspace))?;
        buffers.launch(&rig.stream, 0)?;
        Ok(Box::new(buffers))
    }
}

struct Buffers {
    case: Scan,
    plan: ScanPlan,
    q: Buffer,
    tables: Option<Buffer>,
    scores: Buffer,
    histogram: Option<Buffer>,
    pages: Pages,
    /// Keys of each set. The rest is small and warm in an engine too.
    caches: Vec<Buffer>,
    work: WorkList,
    workspace: Workspace,
    select: Option<ScanSelectPlan>,
    cuts: Buffer,
}

impl Buffers {
    fn with_args(
        &mut self,
        set: usize,
        f: impl FnOnce(&ScanPlan, &mut SelectArgs<'_>, &mut ScanArgs<'_>, &mut WorkList, &mut Workspace) -> Result<()>,
    ) -> Result<()> {
        let Scan { keys, dim, heads, .. } = self.case;
        let mut args = ScanArgs {
            q: self.q.view(),
            q_strides: None,
            rows: self.pages.rows(),
            keys: self.pages.pool(self.caches[set].view(), heads.1, keys, dim),
            tables: self.tables.as_ref().map(Buffer::view),
            scores: Some(self.scores.view_mut()),
            logits: None,
            lse: None,
            histogram: self.histogram.as_mut().map(Buffer::view_mut),
        };
        let mut select = SelectArgs { ks: None, cuts: self.cuts.view_mut() };
        f(&self.plan, &mut select, &mut args, &mut self.work, &mut self.workspace)
    }
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let selecting = self.select;
        self.with_args(set, |plan, select, args, work, workspace| match selecting {
            Some(selecting) => selecting.launch(stream, args, select, work, workspace),
            None => plan.launch(stream, args, work, workspace),
        })
    }

    fn check(&self, rig: &Rig) {
        // Lengths are whole pages: there are no rows beyond them.
        rig.expect_finite("scan scores", &self.scores);
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "scan: {status:?}");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let rotated = Format { hadamard: true, ..Codec::Int4.into() };
    let dense = [Codec::Bf16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2].map(Format::from);
    let books = [2, 4, 8, 32].map(|width| Format::pq(width, 256));
    let mut all = Vec::new();
    let tiny = rig.wants_tiny_shapes();
    let lengths = |batch: usize, t: usize| if tiny { vec![192] } else { vec![t << 10; batch] };
    let shapes: &[(usize, usize)] =
        if tiny { &[(1, 0)] } else { &[(1, 4), (1, 32), (1, 128), (4, 4), (4, 32), (4, 128), (16, 4), (16, 32), (16, 128)] };
    for &(batch, t) in shapes {
        for keys in dense.into_iter().chain([rotated]).chain(books) {
            all.push(Scan::new(keys, lengths(batch, t)));
        }
    }
    for keys in books {
        for codes in [Codes::Equal, Codes::Conflicting] {
            all.push(Scan { codes, ..Scan::new(keys, lengths(1, 128)) });
        }
    }
    let int4 = || Scan::new(Codec::Int4, lengths(1, 128));
    all.push(Scan { method: Reduction::MaxProb, ..int4() });
    all.push(Scan { histogram: true, ..int4() });
    let (k, selected): (usize, &[usize]) = if tiny { (20, &[0]) } else { (2048, &[32, 128]) };
    all.extend(selected.iter().map(|&t| Scan { select: Some(k), ..Scan::new(Codec::Int4, lengths(1, t)) }));
    if tiny {
        all.iter_mut().for_each(|case| case.heads = (8, 2));
    }
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
