//! The sequences of a step of an evicting cache, as the device sees them.

use super::cache::{EvictingCache, EvictingLayer};
use super::store::RowStore;
use super::tables::StoreTables;
use crate::error::invalid;
use crate::exact::ExactShape;
use crate::{BatchShape, Result, SeqId};
use kvlar::{
    AppendLowrankPlan, AppendPlan, AppendShape, AttendPlan, AttendShape, Backend, Buffer, LowrankPlan, LowrankShape,
    SegmentShape, WorkList, Workspace, WorkspaceSize,
};

/// The sequences of a step: plans, tables, lengths and scratch, allocated once and filled by
/// [`EvictingCache::begin`](super::EvictingCache::begin). A sequence that stays at the same place from step to step costs no
/// upload of its page table.
#[derive(Debug)]
pub struct EvictingBatch {
    pub(super) shape: BatchShape,
    pub(super) cache: u64,
    pub(super) layers: Vec<LayerPlans>,
    /// Of each store.
    pub(super) tables: Vec<StoreTables>,
    /// Of the new tokens, `[seqs, new_rows]`.
    pub(super) positions: Buffer,
    /// f32 `[Hk][columns]`: scores of a layer's heads, where they share rows.
    pub(super) head_scores: Buffer,
    pub(super) workspace: Workspace,
    pub(super) active: Vec<(SeqId, usize)>,
}

/// How one layer is written and read. Its work list is its own: no other layer's heads hold as many rows.
#[derive(Debug)]
pub(super) struct LayerPlans {
    pub kind: PlanKind,
    pub work: Option<WorkList>,
    /// Whether the work list is that of this step.
    pub scheduled: bool,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one a layer, made once
pub(super) enum PlanKind {
    Rows {
        append: AppendPlan,
        attend: AttendPlan,
    },
    /// `attend` is `None` for more new tokens than kernels attend from at a time.
    Lowrank {
        append: AppendLowrankPlan,
        attend: Option<LowrankPlan>,
    },
}

impl EvictingCache {
    /// Tables and scratch for steps of some shape.
    ///
    /// # Errors
    /// [`crate::CacheError::Invalid`] for a batch of nothing; [`crate::CacheError::Device`] for a shape without a kernel, or if
    /// memory runs out.
    pub fn batch(&self, shape: BatchShape) -> Result<EvictingBatch> {
        let BatchShape { seqs, new_rows, .. } = shape;
        if seqs == 0 || new_rows == 0 {
            return invalid("batch", format!("{seqs} sequences of {new_rows} new tokens"));
        }
        let layers = self.layers.iter().map(|l| self.layer_plans(&shape, l)).collect::<Result<Vec<_>>>()?;
        let workspace = layers.iter().fold(self.observing_workspace(&shape)?, |size, l| size.max(l.kind.workspace()));
        let c = &self.config;
        let shared = self.stores.iter().any(RowStore::is_shared);
        let columns = if shared { c.max_rows.max(new_rows) } else { 0 };
        let tables = |s: &RowStore| StoreTables::new(&self.device, s, (seqs, new_rows), (c.max_rows, c.max_pages()));
        Ok(EvictingBatch {
            shape,
            cache: self.id,
            layers,
            tables: self.stores.iter().map(tables).collect::<Result<_>>()?,
            positions: self.device.alloc(4 * seqs * new_rows)?,
            head_scores: self.device.alloc(4 * c.kv_heads * columns)?,
            workspace: Workspace::new(&self.device, workspace)?,
            active: Vec::new(),
        })
    }

    fn layer_plans(&self, shape: &BatchShape, layer: &EvictingLayer) -> Result<LayerPlans> {
        let (c, device) = (&self.config, &self.device);
        let [keys, values] = layer.quantized.as_ref().map_or([c.keys, c.values], |q| q.formats);
        let rows = SegmentShape { keys, values, max_rows: c.max_rows };
        let heads = (shape.q_heads, c.kv_heads);
        let of = AttendShape::new(c.dtype, shape.seqs, heads, shape.new_rows, c.head_dim, rows);
        let attend = AttendShape {
            out_dtype: shape.out_dtype,
            value_dim: c.value_dim,
            scale: shape.scale.unwrap_or(of.scale),
            softcap: shape.softcap,
            window: shape.window,
            schedule: shape.schedule,
            ..of
        };
        let (kind, work) = match &layer.lowrank {
            None => {
                let append = AppendShape {
                    dtype: c.dtype,
                    key_format: keys,
                    value_format: values,
                    seqs: shape.seqs,
                    kv_heads: c.kv_heads,
                    new_rows: shape.new_rows,
                    head_dim: c.head_dim,
                    value_dim: c.value_dim,
                };
                let attend = attend.plan(device)?;
                (PlanKind::Rows { append: append.plan(device)?, attend }, Some(attend.work_list(device)?))
            }
            Some(l) => {
                let shared = c.shared(c.pages);
                let append = l.append_shape(&shared, shape.seqs, shape.new_rows).plan(device)?;
                let fits = device.backend() == Backend::Reference || shape.new_rows <= kvlar::MAX_QUERY_ROWS;
                let attend = LowrankShape { stored_positions: true, ..l.attend_shape(&shared, &ExactShape::default(), attend) };
                let attend = if fits { Some(attend.plan(device)?) } else { None };
                let work = attend.map(|a| a.work_list(device)).transpose()?;
                (PlanKind::Lowrank { append, attend }, work)
            }
        };
        Ok(LayerPlans { kind, work, scheduled: false })
    }
}

impl PlanKind {
    fn workspace(&self) -> WorkspaceSize {
        match self {
            Self::Rows { attend, .. } => attend.workspace(),
            Self::Lowrank { append, attend } => {
                append.workspace().max(attend.map_or(WorkspaceSize::default(), |a| a.workspace()))
            }
        }
    }
}

impl EvictingBatch {
    /// What it was made from.
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// Bytes of its tables and scratch; work lists not counted.
    pub fn bytes(&self) -> usize {
        self.tables.iter().map(StoreTables::bytes).sum::<usize>() + self.positions.len() + self.workspace.size().bytes()
    }

    /// Scratch and the status word of its launches.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }
}
