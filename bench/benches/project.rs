//! project: rows to dense latents. append_lowrank: a decode step's keys and values projected, encoded and stored, in one
//! launch.

use kvlar::{
    AppendLowrankArgs, AppendLowrankPlan, AppendLowrankShape, Buffer, Codec, Dtype, HeadGroups, ProjectPlan, ProjectShape,
    Projection, Result, SideArgs, SideShape, Stream, Workspace, padded_rank,
};
use kvlar_bench::{Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, codec_name};
use serde_json::{Value, json};
use std::ops::Range;

pub const OP: Op = Op { name: "project", cases };

/// Rows of kv heads to latents of neighbours, which are half as long as the rows that they are made of.
#[derive(Clone, Copy)]
struct Encoding {
    kv_heads: usize,
    dim: usize,
    /// g: kv heads a group.
    size: usize,
}

impl Encoding {
    /// Of Llama-3.1-8B's heads.
    fn new(size: usize) -> Self {
        Self { kv_heads: 8, dim: 128, size }
    }

    fn tiny(size: usize) -> Self {
        Self { kv_heads: 4, dim: 64, size }
    }

    fn groups(&self) -> usize {
        self.kv_heads / self.size
    }

    fn rank(&self) -> usize {
        self.size * self.dim / 2
    }

    fn encoder_bytes(&self) -> usize {
        2 * self.groups() * self.rank() * self.size * self.dim
    }

    fn row_bytes(&self) -> usize {
        2 * self.kv_heads * self.dim
    }

    fn head_groups(&self, rig: &Rig) -> Result<HeadGroups> {
        let members: Vec<i32> = (0..self.kv_heads as i32).collect();
        HeadGroups::new(&rig.device, &rig.stream, self.kv_heads, self.size, &members)
    }

    /// Encoders that keep the size of what they are multiplied with, a set each: every layer has its own, and by its next
    /// launch other layers have taken its place in the caches.
    fn encoders(&self, rig: &Rig, sets: usize) -> Result<Buffer> {
        rig.scaled_normals(Dtype::Bf16, sets * self.encoder_bytes() / 2, 1.0 / ((self.size * self.dim) as f32).sqrt())
    }

    fn name(&self) -> String {
        format!("g{}-r{}", self.size, self.rank())
    }

    fn parameters(&self) -> Value {
        json!({
            "dtype": "bf16",
            "kv_heads": self.kv_heads,
            "head_dim": self.dim,
            "group_size": self.size,
            "groups": self.groups(),
            "rank": self.rank(),
        })
    }

    /// Of the products with `rows` rows.
    fn flops(&self, rows: usize) -> usize {
        2 * rows * self.groups() * self.rank() * self.size * self.dim
    }
}

/// A set's part of a buffer of all sets.
fn part(set: usize, bytes: usize) -> Range<usize> {
    set * bytes..(set + 1) * bytes
}

#[derive(Clone, Copy)]
struct Project {
    encoding: Encoding,
    rows: usize,
}

impl Project {
    fn x_bytes(&self) -> usize {
        self.rows * self.encoding.row_bytes()
    }

    fn out_bytes(&self) -> usize {
        2 * self.rows * self.encoding.groups() * self.encoding.rank()
    }
}

impl Case for Project {
    fn name(&self) -> String {
        format!("{}/n{}", self.encoding.name(), self.rows)
    }

    fn parameters(&self) -> Value {
        let mut json = self.encoding.parameters();
        json["rows"] = json!(self.rows);
        json["flops"] = json!(self.encoding.flops(self.rows));
        json
    }

    fn bytes(&self) -> usize {
        self.encoding.encoder_bytes() + self.x_bytes() + self.out_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let e = &self.encoding;
        let shape = ProjectShape {
            dtype: Dtype::Bf16,
            out_dtype: Dtype::Bf16,
            seqs: 1,
            kv_heads: e.kv_heads,
            rows: self.rows,
            head_dim: e.dim,
            groups: e.groups(),
            size: e.size,
            rank: e.rank(),
        };
        Ok(Box::new(ProjectBuffers {
            case: *self,
            plan: shape.plan(&rig.device)?,
            groups: e.head_groups(rig)?,
            x: rig.normals(Dtype::Bf16, sets * self.x_bytes() / 2)?,
            encoders: e.encoders(rig, sets)?,
            out: rig.poisoned(sets * self.out_bytes())?,
        }))
    }
}

/// Of all sets.
struct ProjectBuffers {
    case: Project,
    plan: ProjectPlan,
    groups: HeadGroups,
    x: Buffer,
    encoders: Buffer,
    out: Buffer,
}

impl Launches for ProjectBuffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let from = Projection {
            x: self.x.view().slice(part(set, self.case.x_bytes()))?,
            x_strides: None,
            encoder: self.encoders.view().slice(part(set, self.case.encoding.encoder_bytes()))?,
            groups: &self.groups,
            offset: None,
        };
        self.plan.launch(stream, &from, &mut self.out.view_mut().slice(part(set, self.case.out_bytes()))?)
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite_bf16("project", &self.out);
    }
}

/// A decode step.
#[derive(Clone, Copy)]
struct Append {
    encoding: Encoding,
    codec: Codec,
    seqs: usize,
}

impl Append {
    fn x_bytes(&self) -> usize {
        self.seqs * self.encoding.row_bytes()
    }

    /// Of the stored row of one group.
    fn stored_bytes(&self) -> usize {
        let rank = padded_rank(self.encoding.rank());
        self.codec.row_bytes(rank) + self.codec.params_bytes(rank, rank)
    }

    fn slot_bytes(&self) -> usize {
        4 * self.seqs
    }
}

impl Case for Append {
    fn name(&self) -> String {
        format!("append_lowrank/{}/{}/b{}", self.encoding.name(), codec_name(self.codec), self.seqs)
    }

    fn parameters(&self) -> Value {
        let mut json = self.encoding.parameters();
        json["codec"] = json!(codec_name(self.codec));
        json["batch"] = json!(self.seqs);
        json["new_rows"] = json!(1);
        json["page_rows"] = json!(HEAD_PAGE_ROWS);
        json["flops"] = json!(2 * self.encoding.flops(self.seqs));
        json
    }

    fn bytes(&self) -> usize {
        let stored = self.seqs * self.encoding.groups() * self.stored_bytes();
        2 * (self.encoding.encoder_bytes() + self.x_bytes() + stored) + self.slot_bytes()
    }

    fn set_bytes(&self) -> usize {
        // Rows of all sets share pages, so the last page of a sequence may be in part empty.
        self.bytes() + 2 * self.seqs * self.encoding.groups() * HEAD_PAGE_ROWS * self.stored_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let e = &self.encoding;
        let side = SideShape::Project {
            kv_heads: e.kv_heads,
            head_dim: e.dim,
            groups: e.groups(),
            size: e.size,
            rank: e.rank(),
            codec: self.codec,
        };
        let shape = AppendLowrankShape { dtype: Dtype::Bf16, seqs: self.seqs, new_rows: 1, keys: side, values: side };
        let plan = shape.plan(&rig.device)?;
        // Set i stores the row that follows set i - 1's: every launch writes memory of its own.
        let pages = Pages::new(rig, &vec![sets; self.seqs], false)?;
        let slots: Vec<i32> = (0..sets).flat_map(|set| vec![set as i32; self.seqs]).collect();
        let pool_bytes = pages.count * HEAD_PAGE_ROWS * e.groups() * self.stored_bytes();
        Ok(Box::new(AppendBuffers {
            case: *self,
            plan,
            groups: e.head_groups(rig)?,
            keys: Side::new(rig, self, sets, pool_bytes)?,
            values: Side::new(rig, self, sets, pool_bytes)?,
            slots: rig.upload(&slots)?,
            pages,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

/// Keys or values; inputs of all sets.
struct Side {
    x: Buffer,
    encoders: Buffer,
    pool: Buffer,
}

impl Side {
    fn new(rig: &Rig, case: &Append, sets: usize, pool_bytes: usize) -> Result<Self> {
        Ok(Self {
            x: rig.normals(Dtype::Bf16, sets * case.x_bytes() / 2)?,
            encoders: case.encoding.encoders(rig, sets)?,
            pool: rig.device.alloc(pool_bytes)?,
        })
    }

    fn args<'a>(&'a mut self, case: &Append, groups: &'a HeadGroups, pages: &Pages, set: usize) -> Result<SideArgs<'a>> {
        let from = Projection {
            x: self.x.view().slice(part(set, case.x_bytes()))?,
            x_strides: None,
            encoder: self.encoders.view().slice(part(set, case.encoding.encoder_bytes()))?,
            groups,
            offset: None,
        };
        let rank = padded_rank(case.encoding.rank());
        let pool = pages.pool(self.pool.view_mut(), case.encoding.groups(), case.codec, rank);
        Ok(SideArgs::Project { from, pool })
    }
}

struct AppendBuffers {
    case: Append,
    plan: AppendLowrankPlan,
    groups: HeadGroups,
    keys: Side,
    values: Side,
    slots: Buffer,
    pages: Pages,
    workspace: Workspace,
}

impl Launches for AppendBuffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = AppendLowrankArgs {
            keys: self.keys.args(&self.case, &self.groups, &self.pages, set)?,
            values: self.values.args(&self.case, &self.groups, &self.pages, set)?,
            positions: None,
            slots: self.slots.view().slice(part(set, self.case.slot_bytes()))?,
            rows: self.pages.rows(),
            row_positions: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "append_lowrank: {status:?}");
        for pool in [&self.keys.pool, &self.values.pool] {
            let mut bytes = vec![0u8; pool.len().min(1 << 20)];
            rig.stream.download(pool, 0, &mut bytes).expect("a download");
            assert!(bytes.iter().any(|&x| x != 0), "append_lowrank stored nothing");
        }
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let tiny = rig.wants_tiny_shapes();
    let encoding = |size| if tiny { Encoding::tiny(size) } else { Encoding::new(size) };
    let mut all = Vec::new();
    for size in [1, 2, 4] {
        let rows: &[usize] = if tiny { &[1, 33] } else { &[1, 8, 512] };
        all.extend(rows.iter().map(|&rows| Box::new(Project { encoding: encoding(size), rows }) as Box<dyn Case>));
    }
    for (size, codec) in [(1, Codec::Bf16), (2, Codec::Bf16), (4, Codec::Bf16), (2, Codec::Int8)] {
        for seqs in if tiny { [1, 3] } else { [1, 64] } {
            all.push(Box::new(Append { encoding: encoding(size), codec, seqs }));
        }
    }
    all
}
