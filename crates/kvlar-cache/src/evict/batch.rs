//! The sequences of a step of an evicting cache, as the device sees them.

use super::cache::{EvictingCache, EvictingLayer};
use super::decoded::DecodedRows;
use super::store::RowStore;
use super::tables::StoreTables;
use crate::exact::ExactShape;
use crate::turn::Turn;
use crate::{BatchShape, Result};
use kvlar::{
    AppendLowrankPlan, AppendPlan, AttendPlan, Backend, Buffer, LowrankPlan, LowrankShape, WorkList, Workspace, WorkspaceSize,
};

/// The sequences of a step: plans, tables, lengths and scratch, allocated once and filled by
/// [`EvictingCache::begin`](super::EvictingCache::begin). A sequence that stays at the same place from step to step costs no
/// upload of its page table.
#[derive(Debug)]
pub struct EvictingBatch {
    pub(super) turn: Turn,
    pub(super) layers: Vec<LayerPlans>,
    /// Of each store.
    pub(super) tables: Vec<StoreTables>,
    /// Of the new tokens, `[seqs, new_rows]`.
    pub(super) positions: Buffer,
    /// f32 `[Hk][columns]`: scores of a layer's heads, where they share rows.
    pub(super) head_scores: Buffer,
    /// A layer's keys as scores take them, where they are codes.
    pub(super) decoded_keys: Option<DecodedRows>,
    pub(super) workspace: Workspace,
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
pub(super) enum PlanKind {
    Rows(Box<(AppendPlan, AttendPlan)>),
    /// Without attention for more new tokens than kernels attend from at a time.
    Lowrank(Box<(AppendLowrankPlan, Option<LowrankPlan>)>),
}

impl EvictingCache {
    /// Tables and scratch for steps of some shape.
    ///
    /// # Errors
    /// [`crate::CacheError::Invalid`] for a batch of nothing; [`crate::CacheError::Device`] for a shape without a kernel, or if
    /// memory runs out.
    pub fn batch(&self, shape: BatchShape) -> Result<EvictingBatch> {
        let BatchShape { seqs, new_rows, .. } = shape;
        let turn = Turn::new(self.id, shape)?;
        let layers = self.layers.iter().map(|l| self.layer_plans(&shape, l)).collect::<Result<Vec<_>>>()?;
        let workspace = layers.iter().fold(self.observing_workspace(&shape)?, |size, l| size.max(l.kind.workspace()));
        let c = &self.config;
        let shared = self.stores.iter().any(RowStore::is_shared);
        let columns = if shared { c.max_rows.max(new_rows) } else { 0 };
        let tables = |s: &RowStore| StoreTables::new(&self.device, s, (seqs, new_rows), (c.max_rows, c.max_pages()));
        let [decoded_keys, _] = if self.policy.scores_late() { [None, None] } else { self.decoded_rows()? };
        Ok(EvictingBatch {
            turn,
            layers,
            tables: self.stores.iter().map(tables).collect::<Result<_>>()?,
            positions: self.device.alloc(4 * seqs * new_rows)?,
            head_scores: self.device.alloc(4 * c.kv_heads * columns)?,
            decoded_keys,
            workspace: Workspace::new(&self.device, workspace)?,
        })
    }

    fn layer_plans(&self, shape: &BatchShape, layer: &EvictingLayer) -> Result<LayerPlans> {
        let (c, device) = (self.config.shared(self.config.pages), &self.device);
        let formats = layer.quantized.as_ref().map_or([c.keys, c.values], |q| q.formats);
        let attend = shape.attend(&c, formats);
        let (kind, work) = match &layer.lowrank {
            None => {
                let attend = attend.plan(device)?;
                let append = shape.append(&c, formats).plan(device)?;
                (PlanKind::Rows(Box::new((append, attend))), Some(attend.work_list(device)?))
            }
            Some(l) => {
                let append = l.append_shape(&c, shape.seqs, shape.new_rows).plan(device)?;
                let fits = device.backend() == Backend::Reference || shape.new_rows <= kvlar::MAX_QUERY_ROWS;
                let attend = LowrankShape { stored_positions: true, ..l.attend_shape(&c, &ExactShape::default(), attend) };
                let attend = if fits { Some(attend.plan(device)?) } else { None };
                let work = attend.map(|a| a.work_list(device)).transpose()?;
                (PlanKind::Lowrank(Box::new((append, attend))), work)
            }
        };
        Ok(LayerPlans { kind, work, scheduled: false })
    }
}

impl PlanKind {
    fn workspace(&self) -> WorkspaceSize {
        match self {
            Self::Rows(plans) => plans.1.workspace(),
            Self::Lowrank(plans) => {
                let (append, attend) = &**plans;
                append.workspace().max(attend.map_or(WorkspaceSize::default(), |a| a.workspace()))
            }
        }
    }
}

impl EvictingBatch {
    /// What it was made from.
    pub fn shape(&self) -> &BatchShape {
        &self.turn.shape
    }

    /// Bytes of its tables and scratch; work lists not counted.
    pub fn bytes(&self) -> usize {
        let tables: usize = self.tables.iter().map(StoreTables::bytes).sum();
        let decoded = self.decoded_keys.as_ref().map_or(0, DecodedRows::bytes);
        tables + self.positions.len() + self.head_scores.len() + decoded + self.workspace.size().bytes()
    }

    /// Scratch and the status word of its launches.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }
}
