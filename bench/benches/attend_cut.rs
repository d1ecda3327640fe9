//! attend_cut: a decode step with selection (scan_select over 4-bit keys, and attention over the best rows of the bf16 cache)
//! beside attention over everything; Llama-3.1-8B's heads, paged.

use kvlar::{
    AttendArgs, AttendCutPlan, AttendCutShape, AttendShape, Buffer, Codec, CutArgs, Dtype, Format, Reduction, Result, ScanArgs,
    ScanSelectPlan, ScanSelectShape, ScanShape, Segment, SegmentShape, SelectArgs, Stream, WorkList, Workspace,
};
use kvlar_bench::{Attend, Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, RowBlock};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "attend_cut", cases };

const SCANNED: Codec = Codec::Int4;

#[derive(Clone)]
struct Selected {
    /// Rows of each sequence: whole pages.
    rows: usize,
    batch: usize,
    /// How many of them each kv head attends to.
    k: usize,
    /// Whether the scan is timed too.
    scan: bool,
    heads: (usize, usize),
    dim: usize,
}

impl Selected {
    fn scan_shape(&self) -> ScanShape {
        let scan = ScanShape::new(Dtype::Bf16, self.batch, self.heads, self.dim, SCANNED, self.rows);
        ScanShape { scores: Some(Reduction::MaxLogit), ..scan }
    }

    /// Pages of one head.
    fn head_pages(&self) -> usize {
        self.batch * self.rows.div_ceil(HEAD_PAGE_ROWS) * self.heads.1
    }
}

impl Case for Selected {
    fn name(&self) -> String {
        let with = if self.scan { "scan_select+" } else { "" };
        format!("{with}attend_cut/b{}/t{}/k{}", self.batch, self.rows, self.k)
    }

    fn parameters(&self) -> Value {
        json!({
            "batch": self.batch,
            "rows": self.rows,
            "k": self.k,
            "scan": if self.scan { json!(format!("{SCANNED:?}")) } else { Value::Null },
            "q_heads": self.heads.0,
            "kv_heads": self.heads.1,
            "head_dim": self.dim,
            "page_rows": HEAD_PAGE_ROWS,
        })
    }

    /// Scores, the selected rows, and what the scan reads.
    fn bytes(&self) -> usize {
        let heads = self.batch * self.heads.1;
        let scanned = if self.scan { Format::from(SCANNED).stored(self.dim).bytes(self.rows) + 4 * self.rows } else { 0 };
        heads * (scanned + 4 * self.rows + 4 * self.dim * self.k) + self.batch * self.heads.0 * self.dim * 6
    }

    fn set_bytes(&self) -> usize {
        self.head_pages() * HEAD_PAGE_ROWS * 4 * self.dim
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (device, b, pages) = (&rig.device, self.batch, self.head_pages());
        let (heads, queries) = (b * self.heads.1, b * self.heads.0);
        let scan = ScanSelectShape::new(self.scan_shape(), self.k).plan(device)?;
        let dense = AttendShape::new(Dtype::Bf16, b, self.heads, 1, self.dim, SegmentShape::new(Codec::Bf16, self.rows));
        let cut = AttendCutShape::new(dense).plan(device)?;
        let (dense, codes) = (RowBlock::new(rig, Codec::Bf16, self.dim, pages), RowBlock::new(rig, SCANNED, self.dim, pages));
        let cache = |_| Ok([codes.fill(rig, pages)?, dense.fill(rig, pages)?, dense.fill(rig, pages)?]);
        let size = scan.workspace().max(cut.attend().workspace());
        let mut buffers = Buffers {
            case: self.clone(),
            q: rig.normals(Dtype::Bf16, queries * self.dim)?,
            out: rig.poisoned(4 * queries * self.dim)?,
            scores: rig.poisoned(4 * heads * self.rows)?,
            cuts: rig.poisoned(8 * heads)?,
            pages: Pages::new(rig, &vec![self.rows; b], false)?,
            caches: (0..sets).map(cache).collect::<Result<_>>()?,
            lists: (scan.scan().work_list(device)?, cut.attend().work_list(device)?),
            workspace: Workspace::new(device, size)?,
            scan,
            cut,
        };
        buffers.step(&rig.stream, 0, true, true)?;
        Ok(Box::new(buffers))
    }
}

struct Buffers {
    case: Selected,
    scan: ScanSelectPlan,
    cut: AttendCutPlan,
    q: Buffer,
    out: Buffer,
    scores: Buffer,
    cuts: Buffer,
    pages: Pages,
    /// Scanned keys, keys and values of each set.
    caches: Vec<[Buffer; 3]>,
    lists: (WorkList, WorkList),
    workspace: Workspace,
}

impl Buffers {
    fn step(&mut self, stream: &Stream, set: usize, schedule: bool, scan: bool) -> Result<()> {
        let (dim, heads) = (self.case.dim, self.case.heads.1);
        let [codes, keys, values] = &self.caches[set];
        let workspace = &mut self.workspace;
        if scan {
            let mut args = ScanArgs {
                q: self.q.view(),
                q_strides: None,
                rows: self.pages.rows(),
                keys: self.pages.pool(codes.view(), heads, SCANNED, dim),
                tables: None,
                scores: Some(self.scores.view_mut()),
                logits: None,
                lse: None,
                histogram: None,
            };
            if schedule {
                self.scan.scan().schedule(stream, &args, &mut self.lists.0, workspace)?;
            }
            let mut select = SelectArgs { ks: None, cuts: self.cuts.view_mut() };
            self.scan.launch(stream, &mut args, &mut select, &self.lists.0, workspace)?;
        }
        let segments = [Segment {
            rows: self.pages.rows(),
            keys: self.pages.pool(keys.view(), heads, Codec::Bf16, dim),
            values: self.pages.pool(values.view(), heads, Codec::Bf16, dim),
            tables: Default::default(),
        }];
        let mut args = AttendArgs {
            q: self.q.view(),
            q_strides: None,
            out: self.out.view_mut(),
            out_strides: None,
            lse: None,
            segments: &segments,
            q_positions: None,
            sink_logits: None,
        };
        if schedule {
            self.cut.attend().schedule(stream, &args, &mut self.lists.1, workspace)?;
        }
        let cut = CutArgs { scores: self.scores.view(), score_stride: self.case.rows, cuts: self.cuts.view() };
        self.cut.launch(stream, &mut args, &cut, &self.lists.1, workspace)
    }
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        self.step(stream, set, false, self.case.scan)
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("attend_cut out", &self.out);
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "attend_cut: {status:?}");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let tiny = rig.wants_tiny_shapes();
    let heads = if tiny { (8, 2) } else { (32, 8) };
    let shapes: &[(usize, usize, usize)] =
        if tiny { &[(1, 192, 20)] } else { &[(1, 32 << 10, 2048), (1, 128 << 10, 2048), (16, 32 << 10, 2048)] };
    let mut all: Vec<Box<dyn Case>> = Vec::new();
    for &(batch, rows, k) in shapes {
        all.push(Box::new(Attend { heads, ..Attend::new(Codec::Bf16, vec![rows; batch]) }));
        for scan in [false, true] {
            all.push(Box::new(Selected { rows, batch, k, scan, heads, dim: 128 }));
        }
    }
    all
}
