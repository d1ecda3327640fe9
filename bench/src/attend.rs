//! Attention over dense or quantized rows: one query row a sequence over paged caches. Dense rows are what the other
//! kinds are measured beside.

use crate::{Case, HEAD_PAGE_ROWS, Launches, Pages, Rig, RowBlock, format_name};
use kvlar::{
    AttendArgs, AttendPlan, AttendShape, Buffer, Codec, Dtype, Format, Result, Segment, SegmentShape, Stream, WorkList, Workspace,
};
use serde_json::{Value, json};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The attention: once a layer.
    Attend,
    /// The work list: once a step.
    Schedule,
}

/// A case of `attend`.
#[derive(Clone, Debug)]
pub struct Attend {
    /// What is timed.
    pub part: Part,
    /// Type of q.
    pub dtype: Dtype,
    /// Of key rows and of value rows.
    pub formats: (Format, Format),
    /// Rows of each sequence.
    pub lengths: Vec<usize>,
    /// Rows next to each other, instead of in pages.
    pub contiguous: bool,
    /// (Hq, Hk)
    pub heads: (usize, usize),
    /// d
    pub dim: usize,
}

impl Attend {
    /// The decode step of Llama-3.1-8B's heads.
    pub fn new(codec: Codec, lengths: Vec<usize>) -> Self {
        let dtype = if codec == Codec::F16 { Dtype::F16 } else { Dtype::Bf16 };
        Self {
            part: Part::Attend,
            dtype,
            formats: (codec.into(), codec.into()),
            lengths,
            contiguous: false,
            heads: (32, 8),
            dim: 128,
        }
    }

    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Pages of one head, keys or values.
    fn head_pages(&self) -> usize {
        self.lengths.len() * self.longest().div_ceil(HEAD_PAGE_ROWS) * self.heads.1
    }

    /// Of a head's keys and values.
    fn rows_bytes(&self, rows: usize) -> usize {
        self.formats.0.stored(self.dim).bytes(rows) + self.formats.1.stored(self.dim).bytes(rows)
    }

    /// `int4`, or `int8-int4` where keys and values differ in more than the rotation.
    fn format_name(&self) -> String {
        let (keys, values) = (format_name(self.formats.0), format_name(self.formats.1));
        if keys.trim_end_matches("+hadamard") == values { keys } else { format!("{keys}-{values}") }
    }
}

impl Case for Attend {
    fn name(&self) -> String {
        let codec = self.format_name();
        let (b, t) = (self.lengths.len(), self.longest());
        let ragged = if self.lengths.iter().any(|&n| n != t) { "/ragged" } else { "" };
        let contiguous = if self.contiguous { "/contiguous" } else { "" };
        let part = if self.part == Part::Schedule { "schedule/" } else { "" };
        format!("{part}{codec}/b{b}/t{t}{ragged}{contiguous}")
    }

    fn parameters(&self) -> Value {
        json!({
            "dtype": self.dtype.to_string(),
            "codec": self.format_name(),
            "batch": self.lengths.len(),
            "rows": self.lengths.iter().sum::<usize>(),
            "longest": self.longest(),
            "q_heads": self.heads.0,
            "kv_heads": self.heads.1,
            "head_dim": self.dim,
            "page_rows": if self.contiguous { Value::Null } else { json!(HEAD_PAGE_ROWS) },
            "schedule": "balanced",
        })
    }

    fn bytes(&self) -> usize {
        let (b, rows) = (self.lengths.len(), self.lengths.iter().sum::<usize>());
        if self.part == Part::Schedule {
            return 4 * b;
        }
        let pages: usize = self.lengths.iter().map(|n| n.div_ceil(HEAD_PAGE_ROWS)).sum();
        let table = if self.contiguous { 0 } else { 4 * pages };
        let queries = b * self.heads.0 * (self.dim * (self.dtype.bytes() + 4) + 4);
        self.heads.1 * self.rows_bytes(rows) + table + 4 * b + queries
    }

    fn set_bytes(&self) -> usize {
        self.head_pages() * self.rows_bytes(HEAD_PAGE_ROWS)
    }

    fn max_sets(&self) -> usize {
        if self.part == Part::Schedule { 1 } else { 1024 }
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (b, device) = (self.lengths.len(), &rig.device);
        let segment = SegmentShape {
            keys: self.formats.0,
            values: self.formats.1,
            max_rows: self.longest().next_multiple_of(HEAD_PAGE_ROWS),
        };
        let plan = AttendShape::new(self.dtype, b, self.heads, 1, self.dim, segment).plan(device)?;
        let (keys, values) = (
            RowBlock::new(rig, self.formats.0, self.dim, self.head_pages()),
            RowBlock::new(rig, self.formats.1, self.dim, self.head_pages()),
        );
        let cache = |_| Ok((keys.fill(rig, self.head_pages())?, values.fill(rig, self.head_pages())?));
        let queries = b * self.heads.0;
        let mut buffers = Buffers {
            case: self.clone(),
            plan,
            q: rig.normals(self.dtype, queries * self.dim)?,
            out: rig.poisoned(4 * queries * self.dim)?,
            lse: rig.poisoned(4 * queries)?,
            pages: Pages::new(rig, &self.lengths, self.contiguous)?,
            caches: (0..sets).map(cache).collect::<Result<_>>()?,
            work: plan.work_list(device)?,
            workspace: Workspace::new(device, plan.workspace())?,
        };
        // The list depends on the lengths alone: one serves all sets, as in an engine it serves all layers.
        buffers.with_args(0, |plan, args, work, workspace| {
            plan.schedule(&rig.stream, args, work, workspace)?;
            plan.launch(&rig.stream, args, work, workspace)
        })?;
        Ok(Box::new(buffers))
    }
}

struct Buffers {
    case: Attend,
    plan: AttendPlan,
    q: Buffer,
    out: Buffer,
    lse: Buffer,
    pages: Pages,
    /// Keys and values of each set. The rest is small and warm in an engine too.
    caches: Vec<(Buffer, Buffer)>,
    work: WorkList,
    workspace: Workspace,
}

impl Buffers {
    fn with_args(
        &mut self,
        set: usize,
        f: impl FnOnce(&AttendPlan, &mut AttendArgs<'_>, &mut WorkList, &mut Workspace) -> Result<()>,
    ) -> Result<()> {
        let Attend { formats, dim, heads, .. } = self.case;
        let (keys, values) = &self.caches[set];
        let segments = [Segment {
            rows: self.pages.rows(),
            keys: self.pages.pool(keys.view(), heads.1, formats.0, dim),
            values: self.pages.pool(values.view(), heads.1, formats.1, dim),
            tables: Default::default(),
        }];
        let mut args = AttendArgs {
            q: self.q.view(),
            q_strides: None,
            out: self.out.view_mut(),
            out_strides: None,
            lse: Some(self.lse.view_mut()),
            segments: &segments,
            q_positions: None,
            sink_logits: None,
        };
        f(&self.plan, &mut args, &mut self.work, &mut self.workspace)
    }
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let part = self.case.part;
        self.with_args(set, |plan, args, work, workspace| match part {
            Part::Attend => plan.launch(stream, args, work, workspace),
            Part::Schedule => plan.schedule(stream, args, work, workspace),
        })
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("attend out", &self.out);
        rig.expect_finite("attend lse", &self.lse);
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "attend: {status:?}");
    }
}
