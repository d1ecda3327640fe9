//! What scans are planned from.

use super::kernel::Kernel;
use super::plan::ScanPlan;
use crate::append::check_dim;
use crate::error::{invalid, unsupported};
use crate::{Device, Dtype, Format, ReduceShape, Reduction, Result, Schedule};

/// What [`ScanPlan`] is made from. Start from [`ScanShape::new`] and change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScanShape {
    /// Type of q: bf16 or f16.
    pub dtype: Dtype,
    /// Of the key rows: any format that [`crate::EncodeShape`] writes.
    pub keys: Format,
    /// B.
    pub seqs: usize,
    /// Hq; query head h reads kv head h / (Hq / Hk).
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// T: capacity of a (sequence, kv head), and columns of scores and logits.
    pub rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// How the query heads of a kv head share a score; `None`: there are no scores.
    pub scores: Option<Reduction>,
    /// Whether logits are an output.
    pub logits: bool,
    /// Whether a histogram of the scores is one.
    pub histogram: bool,
    /// Rows beyond a length get −∞; else they are left as they are.
    pub fill: bool,
    /// How rows are shared among CTAs.
    pub schedule: Schedule,
}

impl ScanShape {
    /// `heads` = (Hq, Hk); scores by [`Reduction::MaxLogit`], nothing else; scale 1/√d, filled.
    pub fn new(dtype: Dtype, seqs: usize, heads: (usize, usize), head_dim: usize, keys: impl Into<Format>, rows: usize) -> Self {
        Self {
            dtype,
            keys: keys.into(),
            seqs,
            q_heads: heads.0,
            kv_heads: heads.1,
            rows,
            head_dim,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            scores: Some(Reduction::MaxLogit),
            logits: false,
            histogram: false,
            fill: true,
            schedule: Schedule::Balanced,
        }
    }

    /// Query heads a kv head.
    pub(super) fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    fn check(&self) -> Result<()> {
        if self.dtype == Dtype::F32 {
            return unsupported("scan", "type f32 of q: bf16 and f16 are");
        }
        check_dim("scan", "head_dim", self.head_dim)?;
        if self.kv_heads == 0 || self.q_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return invalid("q_heads", format!("{} query heads are not a multiple of {} kv heads", self.q_heads, self.kv_heads));
        }
        if !self.scale.is_finite() {
            return invalid("scale", format!("{} is not finite", self.scale));
        }
        if self.rows > 1 << 30 {
            return invalid("rows", format!("{} rows are more than 2^30", self.rows));
        }
        if self.histogram && self.scores.is_none() {
            return invalid("histogram", "there are no scores to count");
        }
        self.keys.check("keys", self.head_dim)
    }

    /// Validates, and picks the kernel, its grid and how much scratch it needs.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a type or head dimension without a kernel; [`crate::Error::Invalid`] for a
    /// contradiction.
    pub fn plan(&self, device: &Device) -> Result<ScanPlan> {
        self.check()?;
        let kernel = Kernel::of(self, device.info())?;
        let query_tiles = self.group().div_ceil(kernel.columns);
        let units = self.seqs * self.kv_heads * query_tiles;
        let max_tiles = self.rows.div_ceil(kernel.tile_rows);
        if units.saturating_mul(max_tiles.max(1)) > i32::MAX as usize {
            return invalid("rows", format!("{units} units of {max_tiles} tiles are more than 2^31"));
        }
        // As attention's: a split is at least 16 tiles, and a unit has at most 64.
        let own_cell_tiles = match self.schedule {
            Schedule::Balanced => 0,
            Schedule::Own => max_tiles.div_ceil(64).max(16),
        };
        let ctas = device.info().sm_count as usize * kernel.ctas_per_sm(device.info());
        let slots = match self.schedule {
            Schedule::Balanced => 2 * ctas,
            Schedule::Own => units * max_tiles.div_ceil(own_cell_tiles).max(1),
        };
        // Scores that need the lse of all rows, or heads of several tiles, are made of logits.
        let reduce = match self.scores {
            Some(method) if method == Reduction::MaxProb || query_tiles > 1 => Some(
                ReduceShape {
                    seqs: self.seqs,
                    q_heads: self.q_heads,
                    kv_heads: self.kv_heads,
                    rows: self.rows,
                    method,
                    histogram: self.histogram,
                    fill: self.fill,
                }
                .plan(device)?,
            ),
            _ => None,
        };
        let grid = if units == 0 { 0 } else { ctas as u32 };
        Ok(ScanPlan { shape: *self, kernel, grid, query_tiles, units, slots, own_cell_tiles, reduce })
    }
}
