//! The sequences of one step, as the device sees them.

use crate::exact::ExactShape;
use crate::layer::{Layer, native};
use crate::quantized::RowBatch;
use crate::tables::Tables;
use crate::turn::Turn;
use crate::{CacheConfig, Result};
use kvlar::{
    AppendLowrankPlan, AppendPlan, AppendShape, AttendShape, Backend, Buffer, Device, Dtype, Format, LowrankPlan, Schedule,
    SegmentShape, WorkList, Workspace, WorkspaceSize,
};

/// What a [`Batch`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchShape {
    /// Most sequences a step.
    pub seqs: usize,
    /// Most new tokens a sequence and step.
    pub new_rows: usize,
    /// Hq.
    pub q_heads: usize,
    /// Type of the output: f32 or that of q.
    pub out_dtype: Dtype,
    /// Default 1/√d.
    pub scale: Option<f32>,
    /// 0 = off.
    pub softcap: f32,
    /// 0 = off.
    pub window: u32,
    /// How rows are shared among CTAs.
    pub schedule: Schedule,
}

impl BatchShape {
    /// No soft-cap, no window, balanced, f32 output.
    pub fn new(seqs: usize, new_rows: usize, q_heads: usize) -> Self {
        Self {
            seqs,
            new_rows,
            q_heads,
            out_dtype: Dtype::F32,
            scale: None,
            softcap: 0.0,
            window: 0,
            schedule: Schedule::Balanced,
        }
    }

    /// The writing of its new rows as such keys and values.
    pub(crate) fn append(&self, config: &CacheConfig, [key_format, value_format]: [Format; 2]) -> AppendShape {
        AppendShape {
            dtype: config.dtype,
            key_format,
            value_format,
            seqs: self.seqs,
            kv_heads: config.kv_heads,
            new_rows: self.new_rows,
            head_dim: config.head_dim,
            value_dim: config.value_dim,
        }
    }

    /// Attention over such keys and values.
    pub(crate) fn attend(&self, config: &CacheConfig, [keys, values]: [Format; 2]) -> AttendShape {
        let rows = SegmentShape { keys, values, max_rows: config.max_rows };
        let heads = (self.q_heads, config.kv_heads);
        let of = AttendShape::new(config.dtype, self.seqs, heads, self.new_rows, config.head_dim, rows);
        AttendShape {
            out_dtype: self.out_dtype,
            value_dim: config.value_dim,
            scale: self.scale.unwrap_or(of.scale),
            softcap: self.softcap,
            window: self.window,
            schedule: self.schedule,
            ..of
        }
    }
}

/// The sequences of a step: plans, tables, lengths and scratch, allocated once and filled by [`crate::Cache::begin`].
#[derive(Debug)]
pub struct Batch {
    pub(crate) turn: Turn,
    /// Of layers without latents.
    pub(crate) rows: RowBatch,
    /// Decoded keys and values of one layer, `[seqs, Hk, max_rows, dim]`, where some layer has formats that no kernel attends
    /// over.
    pub(crate) decoded: Option<[Buffer; 2]>,
    /// Of exact rows beside latents.
    pub(crate) append_exact: Option<AppendPlan>,
    pub(crate) workspace: Workspace,
    /// By layer; `None` where there are no latents.
    pub(crate) lowrank: Vec<Option<LowrankPlans>>,
    /// Work lists of low-rank layers, and whether each is that of this step; layers that differ in ranks alone share one.
    pub(crate) lowrank_work: Vec<(WorkList, bool)>,
    /// Bytes of all work lists.
    work_bytes: usize,
    pub(crate) tables: Tables,
}

/// Plans of one low-rank layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowrankPlans {
    pub append: AppendLowrankPlan,
    /// `None`: more new tokens than kernels attend from at a time (a prefill, whose attention is the engine's own).
    pub attend: Option<LowrankPlan>,
    /// Index of its work list.
    pub work: usize,
}

impl Batch {
    pub(crate) fn new(
        device: &Device,
        cache: u64,
        config: CacheConfig,
        exact: ExactShape,
        shape: BatchShape,
        layers: &[Layer],
    ) -> Result<Self> {
        let BatchShape { seqs, new_rows, .. } = shape;
        let turn = Turn::new(cache, shape)?;
        let append = shape.append(&config, [config.keys, config.values]);
        let own = native(config.dtype);
        let append_exact = AppendShape { key_format: own.into(), value_format: own.into(), ..append };
        let attend_shape = shape.attend(&config, [config.keys, config.values]);
        let rows = RowBatch::new(device, &config, &exact, append, attend_shape, layers)?;
        let mut workspace = rows.workspace();
        let all_rows = |dim| device.alloc(seqs * config.kv_heads * config.max_rows * dim * config.dtype.bytes());
        let decoded = match rows.decodes() {
            true => Some([all_rows(config.head_dim)?, all_rows(config.value_dim)?]),
            false => None,
        };
        let (mut lowrank, mut lists) = (Vec::new(), Vec::<(LowrankPlan, WorkList)>::new());
        for layer in layers {
            let Some(l) = &layer.lowrank else {
                lowrank.push(None);
                continue;
            };
            let append = l.append_shape(&config, seqs, new_rows).plan(device)?;
            let fits = device.backend() == Backend::Reference || new_rows <= kvlar::MAX_QUERY_ROWS;
            let attend = if fits { Some(l.attend_shape(&config, &exact, attend_shape).plan(device)?) } else { None };
            workspace = workspace.max(append.workspace());
            let mut work = 0;
            if let Some(plan) = attend {
                workspace = workspace.max(plan.workspace());
                work = match lists.iter().position(|(other, _)| other.shares_work_list(&plan)) {
                    Some(i) => i,
                    None => {
                        lists.push((plan, plan.work_list(device)?));
                        lists.len() - 1
                    }
                };
            }
            lowrank.push(Some(LowrankPlans { append, attend, work }));
        }
        Ok(Self {
            turn,
            work_bytes: rows.work_bytes() + lists.iter().map(|(plan, _)| plan.work_list_bytes()).sum::<usize>(),
            rows,
            decoded,
            append_exact: if exact.any() { Some(append_exact.plan(device)?) } else { None },
            workspace: Workspace::new(device, workspace.max(WorkspaceSize::default()))?,
            lowrank,
            lowrank_work: lists.into_iter().map(|(_, work)| (work, false)).collect(),
            tables: Tables::new(device, &config, exact, seqs, new_rows)?,
        })
    }

    /// What it was made from.
    pub fn shape(&self) -> &BatchShape {
        &self.turn.shape
    }

    /// Bytes that it allocated: tables, scratch, work lists, and room for a layer's decoded rows where they are needed.
    pub fn bytes(&self) -> usize {
        let decoded: usize = self.decoded.iter().flatten().map(Buffer::len).sum();
        self.tables.bytes() + self.workspace.size().bytes() + self.work_bytes + decoded
    }

    /// Scratch and the status word of its launches.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }
}
