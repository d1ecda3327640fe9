//! compact: what is left of all layers after an eviction, moved together; alone, and behind the threshold that decides.

use kvlar::{
    Buffer, Codec, Columns, CompactArgs, CompactOrder, CompactPlan, CompactShape, Dtype, Format, Keep, Pool, ProtectArgs,
    ProtectPlan, ProtectShape, Result, RowScores, Rows, Stream, TopkArgs, TopkPlan, TopkShape, Workspace,
};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "compact", cases };

/// Rows of a page, which belongs to one owner.
const PAGE: usize = 64;
const DIM: usize = 128;

/// All layers and heads of one sequence.
#[derive(Clone, Copy)]
struct Compact {
    layers: usize,
    heads: usize,
    /// Held by each.
    rows: usize,
    /// Left of them.
    kept: usize,
    codec: Codec,
    order: CompactOrder,
    /// Whether the rows are chosen too, all layers and heads together: protect, topk, compact.
    step: bool,
}

impl Compact {
    fn owners(&self) -> usize {
        self.layers * self.heads
    }

    fn pages(&self) -> usize {
        self.rows.div_ceil(PAGE)
    }

    fn row_bytes(&self) -> usize {
        let stored = Format::from(self.codec).stored(DIM);
        2 * (stored.row + stored.params)
    }

    /// Rows of an owner that change their place.
    fn moved(&self) -> usize {
        match self.order {
            // Marks are random: all behind the first hole.
            CompactOrder::Keep => self.kept,
            // Those behind the rows left.
            CompactOrder::Any => self.kept * (self.rows - self.kept) / self.rows.max(1),
        }
    }

    fn pool_bytes(&self) -> usize {
        let stored = Format::from(self.codec).stored(DIM);
        self.owners() * self.pages() * stored.bytes(PAGE)
    }
}

impl Case for Compact {
    fn name(&self) -> String {
        let Self { layers, heads, rows, kept, codec, order, step } = self;
        let order = if *order == CompactOrder::Any { "/any" } else { "" };
        format!("{codec:?}/l{layers}h{heads}/t{rows}/k{kept}{order}{}", if *step { "/step" } else { "" }).to_lowercase()
    }

    fn parameters(&self) -> Value {
        let Self { layers, heads, rows, kept, codec, order, step } = self;
        let order = format!("{order:?}").to_lowercase();
        json!({
            "layers": layers, "kv_heads": heads, "rows": rows, "kept": kept, "codec": format!("{codec:?}").to_lowercase(),
            "head_dim": DIM, "order": order, "page_rows": PAGE, "step": step,
        })
    }

    fn bytes(&self) -> usize {
        // Each row that moves, with its position (and score), is read and written; flags are read.
        let along = if self.step { 8 } else { 4 };
        let judged = if self.step { 4 * 3 + 4 + 4 * 2 } else { 1 };
        self.owners() * (2 * self.moved() * (self.row_bytes() + along) + judged * self.rows)
    }

    fn set_bytes(&self) -> usize {
        2 * self.pool_bytes() + self.owners() * self.rows * 16
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (owners, stored) = (self.owners(), Format::from(self.codec).stored(DIM));
        let shape = CompactShape {
            seqs: 1,
            owners,
            owners_a_layer: self.heads,
            keys: stored,
            values: Some(stored),
            max_rows: self.pages() * PAGE,
            order: self.order,
        };
        let positions: Vec<i32> = (0..owners * self.pages() * PAGE).map(|i| (i % (self.pages() * PAGE)) as i32).collect();
        let permutation = rig.with_rng(|rng| rng.permutation(owners * self.pages()));
        let table: Vec<i32> = permutation.iter().map(|&page| page as i32).collect();
        let mut paged = vec![0; positions.len()];
        for (i, &page) in permutation.iter().enumerate() {
            paged[page * PAGE..(page + 1) * PAGE].copy_from_slice(&positions[i * PAGE..(i + 1) * PAGE]);
        }
        let mask: Vec<u8> =
            rig.with_rng(|rng| (0..owners * shape.max_rows).map(|_| (rng.below(self.rows) < self.kept).into()).collect());
        let set = |_| -> Result<Set> {
            Ok(Set {
                keys: rig.normals(Dtype::Bf16, self.pool_bytes() / 2)?,
                values: rig.normals(Dtype::Bf16, self.pool_bytes() / 2)?,
                positions: rig.upload(&paged)?,
                scores: rig.normals(Dtype::F32, owners * shape.max_rows)?,
                lengths: rig.upload(&vec![self.rows as i32; owners])?,
            })
        };
        let topk = TopkShape { members: owners, ..TopkShape::new(1, shape.max_rows, owners * self.kept) }.plan(&rig.device)?;
        let protect = ProtectShape { seqs: 1, owners, rows: shape.max_rows, sink_positions: 4, value: f32::INFINITY, fill: true };
        Ok(Box::new(Buffers {
            case: *self,
            plan: shape.plan(&rig.device)?,
            protect: protect.plan(&rig.device)?,
            topk,
            sets: (0..sets).map(set).collect::<Result<_>>()?,
            table: rig.upload(&table)?,
            mask: rig.upload(&mask)?,
            recent: rig.upload(&[self.rows as i32 - 128])?,
            protected: rig.poisoned(if self.step { 4 * owners * shape.max_rows } else { 4 })?,
            cuts: rig.poisoned(8)?,
            full: rig.upload(&vec![self.rows as i32; owners])?,
            count: rig.upload(&[owners as i32])?,
            restore: ProtectShape { owners: 1, rows: owners, sink_positions: 0, fill: false, ..protect }.plan(&rig.device)?,
            workspace: Workspace::new(&rig.device, if self.step { topk.workspace() } else { Default::default() })?,
        }))
    }
}

struct Set {
    keys: Buffer,
    values: Buffer,
    positions: Buffer,
    scores: Buffer,
    lengths: Buffer,
}

struct Buffers {
    case: Compact,
    plan: CompactPlan,
    protect: ProtectPlan,
    topk: TopkPlan,
    sets: Vec<Set>,
    table: Buffer,
    mask: Buffer,
    recent: Buffer,
    protected: Buffer,
    cuts: Buffer,
    /// What lengths are before a launch.
    full: Buffer,
    count: Buffer,
    restore: ProtectPlan,
    workspace: Workspace,
}

impl Buffers {
    /// Lengths as they were before the last launch on the set: a copy, by a kernel that a graph can hold.
    fn restore(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let owners = self.case.owners();
        let mut args = ProtectArgs {
            rows: Rows::contiguous(None, owners),
            page_count: 1,
            lengths: self.count.view(),
            scores: self.full.view_mut(),
            score_stride: owners,
            recent_from: None,
            staged: None,
            protected: self.sets[set].lengths.view_mut(),
        };
        self.restore.launch(stream, &mut args, &mut self.workspace)
    }

    /// The best rows of all owners together, as a cut.
    fn choose(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let (s, c) = (&mut self.sets[set], self.case);
        let rows = rows_of(&c, &self.table)?;
        let mut args = ProtectArgs {
            rows: Rows { positions: Some(s.positions.view()), ..rows },
            page_count: c.owners() * c.pages(),
            lengths: s.lengths.view(),
            scores: s.scores.view_mut(),
            score_stride: self.plan.shape().max_rows,
            recent_from: Some(self.recent.view()),
            staged: None,
            protected: self.protected.view_mut(),
        };
        self.protect.launch(stream, &mut args, &mut self.workspace)?;
        let mut args = TopkArgs {
            lengths: Some(s.lengths.view()),
            cuts: Some(self.cuts.view_mut()),
            ..TopkArgs::new(self.protected.view())
        };
        self.topk.launch(stream, &mut args, &mut self.workspace)
    }
}

fn rows_of<'a>(c: &Compact, table: &'a Buffer) -> Result<Rows<'a>> {
    let rows = Rows::per_head(table.view(), c.owners(), c.pages(), table.view(), PAGE)?;
    Ok(Rows { lengths: None, ..rows })
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        self.restore(stream, set)?;
        let c = self.case;
        if c.step {
            self.choose(stream, set)?;
        }
        let (stored, columns) = (Format::from(c.codec).stored(DIM), self.plan.shape().max_rows);
        let (owners, pages) = (c.owners(), c.pages());
        let rows = rows_of(&c, &self.table)?;
        let s = &mut self.sets[set];
        let keep = match c.step {
            false => Keep::Mask { mask: self.mask.view(), columns },
            true => Keep::Cut {
                scores: Some(self.protected.view()),
                stride: columns,
                columns,
                cuts: self.cuts.view(),
                members: owners,
                sink_rows: 0,
                recent_rows: 0,
            },
        };
        let mut args = CompactArgs {
            rows,
            lengths: s.lengths.view_mut(),
            positions: Some(s.positions.view_mut()),
            scores: c.step.then(|| RowScores { scores: s.scores.view_mut(), stride: columns }),
            keys: Pool::per_head(s.keys.view_mut(), owners * pages, PAGE, stored.row, stored.params),
            values: Some(Pool::per_head(s.values.view_mut(), owners * pages, PAGE, stored.row, stored.params)),
            keep,
            columns: Columns::Rows,
            source: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        let mut lengths = vec![0i32; self.case.owners()];
        rig.stream.download(&self.sets[0].lengths, 0, bytemuck::cast_slice_mut(&mut lengths)).expect("lengths");
        let left = lengths.iter().map(|&n| n as usize).sum::<usize>() / lengths.len();
        let kept = self.case.kept;
        assert!(left.abs_diff(kept) * 4 <= kept + 40, "compact: {left} rows are left of each owner, not {kept}");
        assert!(self.workspace.status(&rig.stream).expect("a status").is_clean(), "compact: a page or length was bad");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let (bf16, keep, any) = (Codec::Bf16, CompactOrder::Keep, CompactOrder::Any);
    let of = |layers, rows, kept, codec, order, step| Compact { layers, heads: 8, rows, kept, codec, order, step };
    let all = if rig.wants_tiny_shapes() {
        vec![of(2, 200, 100, bf16, keep, false), of(1, 200, 100, Codec::Int4, any, true), of(1, 200, 150, bf16, keep, true)]
    } else {
        // Llama-3.1-8B: half of a context, and a small budget of a long one.
        let mut all = Vec::new();
        for (rows, kept) in [(32 << 10, 16 << 10), (128 << 10, 64 << 10), (128 << 10, 2048)] {
            all.extend([keep, any].map(|order| of(32, rows, kept, bf16, order, false)));
            all.push(of(32, rows, kept, Codec::Int4, keep, false));
        }
        // Qwen3-8B in decode, as Fast KVzip runs it: 128 rows leave each head every 128 steps.
        all.extend([keep, any].map(|order| of(36, 4096 + 128, 4096, bf16, order, true)));
        all
    };
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
