//! attend_lowrank: one query row a sequence over paged latents, the decode step of Llama-3.1-8B's heads; and dense
//! attention over the same rows (`dense/…`), so that one run compares both.

use kvlar::{
    Arithmetic, AttendArgs, AttendShape, Bases, Buffer, Codec, Dtype, HeadSets, Latents, LowrankArgs, LowrankPlan, LowrankShape,
    LowrankValues, Result, Rope, RopeLayout, Segment, SegmentShape, Stream, WorkList, Workspace, padded_rank,
};
use kvlar_bench::{Attend, Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Prefixed, Rig, RowBlock};
use kvlar_reference::{Int8Basis, RopeScaling, RotaryPairs};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "attend_lowrank", cases };

const DTYPE: Dtype = Dtype::Bf16;
const NATIVE: Codec = Codec::Bf16;
/// What the model of a plan's arithmetic is asked for: bytes and 16-bit operations a second of an H200.
const BANDWIDTH: f64 = 4.3e12;
const TENSOR_RATE: f64 = 790e12;

/// What a case is, before it is planned.
#[derive(Clone, Copy)]
struct Setting {
    seqs: usize,
    /// Of each sequence.
    rows: usize,
    /// (Hq, Hk)
    heads: (usize, usize),
    dim: usize,
    /// g: kv heads a group, of keys and of values.
    size: usize,
    /// Of each group's latents.
    rank: usize,
    latents: Latents,
    dense_values: bool,
}

impl Setting {
    /// Latents in 16 bits and of full rank: `kept` makes them shorter.
    fn new(rows: usize, size: usize) -> Self {
        let (heads, dim) = ((32, 8), 128);
        Self { seqs: 1, rows, heads, dim, size, rank: size * dim, latents: Latents::Dtype, dense_values: false }
    }

    /// The rank whose latents, in 16 bits, are `kept` of the bytes of dense rows.
    fn kept(self, kept: f64) -> Self {
        Self { rank: padded_rank((kept * (self.size * self.dim) as f64).round() as usize), ..self }
    }

    fn groups(&self) -> usize {
        self.heads.1.div_ceil(self.size)
    }

    /// Codec, heads and width of value rows.
    fn values(&self) -> (Codec, usize, usize) {
        if self.dense_values { (NATIVE, self.heads.1, self.dim) } else { (self.latents.codec(NATIVE), self.groups(), self.rank) }
    }

    fn sets(&self, rig: &Rig) -> Result<HeadSets> {
        let group: Vec<i32> = (0..self.heads.1).map(|h| (h / self.size) as i32).collect();
        HeadSets::new(&rig.device, &rig.stream, &group, Some(group.as_slice()).filter(|_| !self.dense_values))
    }

    fn plan(&self, rig: &Rig) -> Result<LowrankPlan> {
        let none = SegmentShape::new(NATIVE, 0);
        let attend = AttendShape::new(DTYPE, self.seqs, self.heads, 1, self.dim, none);
        let values = match self.values() {
            _ if self.dense_values => LowrankValues::Dense,
            (codec, _, rank) => LowrankValues::Latent { rank, codec },
        };
        let max_rows = self.rows.next_multiple_of(HEAD_PAGE_ROWS);
        LowrankShape::new(attend, max_rows, self.rank, self.latents, values, self.sets(rig)?.shape()).plan(&rig.device)
    }

    /// Pages of one head or group, of all sequences.
    fn pages(&self) -> usize {
        self.seqs * self.rows.div_ceil(HEAD_PAGE_ROWS)
    }

    fn basis_bytes(&self) -> usize {
        let each = self.heads.1 * self.dim * self.rank;
        let scales = 4 * self.heads.1 * self.dim.next_multiple_of(32) / 2;
        let keys = if self.latents == Latents::Int8Basis { each + scales } else { 2 * each };
        keys + if self.dense_values { 0 } else { 2 * each }
    }

    fn latent_name(&self) -> &'static str {
        match self.latents {
            Latents::Dtype => "bf16",
            Latents::Int8 => "int8",
            Latents::Int4 => "int4",
            Latents::Int8Basis => "int8-basis",
        }
    }

    fn name(&self) -> String {
        let values = if self.dense_values { "/dense-values" } else { "" };
        format!("g{}-r{}/{}{values}/b{}/t{}", self.size, self.rank, self.latent_name(), self.seqs, self.rows)
    }
}

#[derive(Clone, Copy)]
struct Lowrank {
    setting: Setting,
    plan: LowrankPlan,
}

impl Lowrank {
    /// `None` (said so) where the device has no room for a plan.
    fn new(rig: &Rig, setting: Setting) -> Option<Self> {
        match setting.plan(rig) {
            Ok(plan) => Some(Self { setting, plan }),
            Err(e) => {
                eprintln!("attend_lowrank/{}: skipped: {e}", setting.name());
                None
            }
        }
    }

    fn arithmetic(&self) -> Arithmetic {
        self.plan.arithmetic(self.setting.rows)
    }
}

impl Case for Lowrank {
    fn name(&self) -> String {
        self.setting.name()
    }

    fn parameters(&self) -> Value {
        let (s, a) = (&self.setting, self.arithmetic());
        let (resident, heads, warps) = self.plan.residency();
        json!({
            "dtype": DTYPE.to_string(),
            "latents": s.latent_name(),
            "batch": s.seqs,
            "rows": s.seqs * s.rows,
            "longest": s.rows,
            "q_heads": s.heads.0,
            "kv_heads": s.heads.1,
            "head_dim": s.dim,
            "group_size": s.size,
            "key_groups": s.groups(),
            "key_rank": s.rank,
            "value_groups": if s.dense_values { Value::Null } else { json!(s.groups()) },
            "value_rank": if s.dense_values { Value::Null } else { json!(s.rank) },
            "page_rows": HEAD_PAGE_ROWS,
            "schedule": "balanced",
            "kept_without_bases": a.bytes / a.full_bytes,
            "kept_with_bases": (a.bytes + s.basis_bytes() as f64) / a.full_bytes,
            "basis_bytes": s.basis_bytes(),
            "entry": self.plan.entry(),
            "bases_in_shared_memory": resident,
            "heads_a_tile": heads,
            "warps": warps,
            "rebuild_flops": a.rebuild_flops,
            "attention_flops": a.attention_flops,
            "arithmetic": a.to_string(),
            // Of an H200, whatever this runs on; to compare with, not what was measured.
            "model": {
                "bytes_per_second": BANDWIDTH,
                "tensor_flops": TENSOR_RATE,
                "memory_microseconds": a.memory_seconds(BANDWIDTH) * 1e6,
                "tensor_microseconds": a.tensor_seconds(TENSOR_RATE) * 1e6,
                "bound": a.bound(BANDWIDTH, TENSOR_RATE).to_string(),
                "speedup_over_dense": a.speedup(BANDWIDTH, TENSOR_RATE),
            },
        })
    }

    fn bytes(&self) -> usize {
        let s = &self.setting;
        let queries = s.seqs * s.heads.0 * (s.dim * (DTYPE.bytes() + 4) + 4);
        self.arithmetic().bytes as usize + s.basis_bytes() + 4 * s.pages() + 4 * s.seqs + queries
    }

    fn set_bytes(&self) -> usize {
        let s = &self.setting;
        let stored = |codec: Codec, heads: usize, n: usize| heads * (codec.row_bytes(n) + codec.params_bytes(n, n));
        let (codec, heads, width) = s.values();
        let row = stored(s.latents.codec(NATIVE), s.groups(), s.rank) + stored(codec, heads, width);
        s.pages() * HEAD_PAGE_ROWS * row + s.basis_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (s, plan, device) = (&self.setting, self.plan, &rig.device);
        let key_pages = s.groups() * s.pages();
        let (value_codec, value_heads, width) = s.values();
        let keys = RowBlock::new(rig, s.latents.codec(NATIVE), s.rank, key_pages);
        let values = RowBlock::new(rig, value_codec, width, value_heads * s.pages());
        let layer = |_| {
            Ok(Layer {
                keys: keys.fill(rig, key_pages)?,
                values: values.fill(rig, value_heads * s.pages())?,
                bases: LayerBases::new(rig, s)?,
            })
        };
        let queries = s.seqs * s.heads.0;
        let rope = kvlar_reference::Rope::new(500_000.0, s.dim, RopeLayout::Half, RopeScaling::None);
        let mut buffers = Buffers {
            setting: *s,
            plan,
            q: rig.normals(DTYPE, queries * s.dim)?,
            out: rig.poisoned(4 * queries * s.dim)?,
            lse: rig.poisoned(4 * queries)?,
            inv_freq: rig.upload(&rope.inv_freq)?,
            sets: s.sets(rig)?,
            pages: Pages::new(rig, &vec![s.rows; s.seqs], false)?,
            layers: (0..sets).map(layer).collect::<Result<_>>()?,
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

/// Random bases that keep the size of what they are multiplied with.
struct LayerBases {
    keys: Buffer,
    key_scales: Option<Buffer>,
    values: Option<Buffer>,
}

impl LayerBases {
    fn new(rig: &Rig, s: &Setting) -> Result<Self> {
        let (count, scale) = (s.heads.1 * s.dim * s.rank, 1.0 / (s.rank as f32).sqrt());
        let basis = |dtype| rig.scaled_normals(dtype, count, scale);
        let (keys, key_scales) = match s.latents {
            Latents::Dtype => (basis(DTYPE)?, None),
            Latents::Int8 | Latents::Int4 => (basis(Dtype::F16)?, None),
            Latents::Int8Basis => {
                let raw = rig.with_rng(|rng| rng.normals(count, scale));
                let pairs = RotaryPairs { rotary_dim: s.dim, half: true };
                let int8 = Int8Basis::quantize(&raw, None, s.heads.1, s.dim, s.rank, pairs).expect("a basis");
                (rig.upload(&int8.codes)?, Some(rig.upload(&int8.scales)?))
            }
        };
        Ok(Self { keys, key_scales, values: if s.dense_values { None } else { Some(basis(DTYPE)?) } })
    }
}

/// What each layer has of its own: by its next launch, other layers have taken its place in the caches.
struct Layer {
    keys: Buffer,
    values: Buffer,
    bases: LayerBases,
}

struct Buffers {
    setting: Setting,
    plan: LowrankPlan,
    q: Buffer,
    out: Buffer,
    lse: Buffer,
    inv_freq: Buffer,
    sets: HeadSets,
    pages: Pages,
    layers: Vec<Layer>,
    work: WorkList,
    workspace: Workspace,
}

impl Buffers {
    fn with_args(
        &mut self,
        set: usize,
        f: impl FnOnce(&LowrankPlan, &mut LowrankArgs<'_>, &mut WorkList, &mut Workspace) -> Result<()>,
    ) -> Result<()> {
        let (s, layer) = (&self.setting, &self.layers[set]);
        let (value_codec, value_heads, width) = s.values();
        let segments = [Segment {
            rows: self.pages.rows(),
            keys: self.pages.pool(layer.keys.view(), s.groups(), s.latents.codec(NATIVE), s.rank),
            values: self.pages.pool(layer.values.view(), value_heads, value_codec, width),
            tables: Default::default(),
        }];
        let mut args = LowrankArgs {
            attend: AttendArgs {
                q: self.q.view(),
                q_strides: None,
                out: self.out.view_mut(),
                out_strides: None,
                lse: Some(self.lse.view_mut()),
                segments: &segments,
                q_positions: None,
                sink_logits: None,
            },
            bases: Bases {
                keys: layer.bases.keys.view(),
                keys_per_seq: false,
                key_scales: layer.bases.key_scales.as_ref().map(Buffer::view),
                key_mean: None,
                values: layer.bases.values.as_ref().map(Buffer::view),
                values_per_seq: false,
            },
            rope: Some(Rope {
                inv_freq: self.inv_freq.view(),
                rotary_dim: s.dim,
                layout: RopeLayout::Half,
                attention_factor: 1.0,
            }),
            sets: &self.sets,
        };
        f(&self.plan, &mut args, &mut self.work, &mut self.workspace)
    }
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        self.with_args(set, |plan, args, work, workspace| plan.launch(stream, args, work, workspace))
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("attend_lowrank out", &self.out);
        rig.expect_finite("attend_lowrank lse", &self.lse);
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "attend_lowrank: {status:?}");
    }
}

/// Of one length; and dense attention of that length.
fn of_length(rows: usize) -> (Attend, Vec<Setting>) {
    let setting = |size, kept| Setting::new(rows, size).kept(kept);
    let mut all: Vec<Setting> = [1, 2, 4, 8].into_iter().flat_map(|g| [0.25, 0.5].map(|kept| setting(g, kept))).collect();
    for size in [2, 4] {
        all.extend([0.25, 0.5].map(|kept| Setting { latents: Latents::Int8, ..setting(size, kept) }));
        all.push(Setting { latents: Latents::Int8Basis, ..setting(size, 0.25) });
    }
    all.push(Setting { dense_values: true, ..setting(2, 0.5) });
    (Attend::new(NATIVE, vec![rows]), all)
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let mut all = Vec::new();
    let mut add = |dense: Attend, settings: Vec<Setting>| {
        all.push(Box::new(Prefixed("dense", dense)) as Box<dyn Case>);
        all.extend(settings.into_iter().filter_map(|s| Some(Box::new(Lowrank::new(rig, s)?) as Box<dyn Case>)));
    };
    if rig.wants_tiny_shapes() {
        let (rows, heads, dim) = (96, (16, 8), 64);
        let tiny = |size| Setting { heads, dim, ..Setting::new(rows, size) }.kept(0.5);
        let mut settings = [1, 2, 4, 8].map(tiny).to_vec();
        settings.push(Setting { latents: Latents::Int8, ..tiny(2) });
        settings.push(Setting { latents: Latents::Int8Basis, ..tiny(4) });
        settings.push(Setting { dense_values: true, ..tiny(2) });
        settings.push(Setting { seqs: 2, ..tiny(2) });
        add(Attend { heads, dim, ..Attend::new(NATIVE, vec![rows]) }, settings);
    } else {
        for k in [32, 128] {
            let (dense, settings) = of_length(k << 10);
            add(dense, settings);
        }
        let (batch, rows) = (8, 32 << 10);
        add(Attend::new(NATIVE, vec![rows; batch]), vec![Setting { seqs: batch, ..Setting::new(rows, 2).kept(0.5) }]);
    }
    all
}
