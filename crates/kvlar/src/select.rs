//! Choosing rows by score, on the device: the k largest of each row of scores, or of a set of them together, as a cut.
//!
//! A cut is one u64 a set. With `key` the order-preserving integer of a score (NaN < −∞ < finite < +∞, −0 = +0;
//! `kernels/device/order.cuh`) and `i` its index in the set, a score is kept if and only if `key << 32 | !i` is at or above the
//! cut, or it is among the first or last of its row that are always kept. Lists, masks and counts are derived from it on request.

use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::scan::SCORE_BINS;
use crate::{Device, Memory, Result, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

/// What [`TopkPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopkShape {
    /// R: sets, each of which chooses for itself.
    pub batch: usize,
    /// H: rows of scores of a set, which choose together: 1, or the heads or layers that share a budget.
    pub members: usize,
    /// T: scores of a row.
    pub rows: usize,
    /// How many a set keeps at most, sinks and recent rows counted.
    pub k: usize,
    /// First scores of a row that are always kept.
    pub sink_rows: usize,
    /// Last scores of a row's length that are always kept.
    pub recent_rows: usize,
    /// Keep what is above the k-th largest score, and nothing that is equal to it: fewer than k (Fast KVzip, arXiv
    /// 2601.17668, as released). There must be no sinks and recent rows.
    pub strict: bool,
}

impl TopkShape {
    /// The `k` largest of each of `batch` rows.
    pub fn new(batch: usize, rows: usize, k: usize) -> Self {
        Self { batch, members: 1, rows, k, sink_rows: 0, recent_rows: 0, strict: false }
    }
}

/// A validated selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopkPlan {
    shape: TopkShape,
    /// CTAs a row, where many take a set; else one takes a row.
    parts: Option<usize>,
}

/// Scores that one CTA goes over more than once without leaving the L1.
const ROW_OF_A_CTA: usize = 32 << 10;
/// Scores a CTA of `kernels/select/set.cu`.
const PART: usize = 8192;

/// How many rows are kept, where device memory says it.
#[derive(Clone, Copy, Debug)]
pub enum Ks<'a> {
    /// One i32 for all sets.
    One(View<'a>),
    /// i32 `[R]`.
    Each(View<'a>),
}

/// Arguments of [`TopkPlan::launch`].
#[derive(Debug)]
pub struct TopkArgs<'a> {
    /// f32 `[R, H, T]`.
    pub scores: View<'a>,
    /// Scores between the first ones of two rows; `None`: T.
    pub score_stride: Option<usize>,
    /// How many scores there are of each row, i32 `[R, H]`; `None`: T. Others are clamped to 0..=T.
    pub lengths: Option<View<'a>>,
    /// How many are kept; `None`: the shape's k, which is the most. Rows that are always kept are, whatever it says.
    pub ks: Option<Ks<'a>>,
    /// u64 `[R]`, each a cut that keeps just these rows.
    pub cuts: Option<ViewMut<'a>>,
    /// i32 `[R, H]`.
    pub counts: Option<ViewMut<'a>>,
    /// i32 `[R, k]`: the rows, ascending, −1 behind the last; for sets of one row.
    pub selected: Option<ViewMut<'a>>,
    /// u8 `[R, H, T]`: 1 for a row that is kept.
    pub mask: Option<ViewMut<'a>>,
}

impl<'a> TopkArgs<'a> {
    /// Of scores one row after the other, all of them; no output yet.
    pub fn new(scores: View<'a>) -> Self {
        let (cuts, counts, selected, mask) = (None, None, None, None);
        Self { scores, score_stride: None, lengths: None, ks: None, cuts, counts, selected, mask }
    }
}

impl TopkShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a k below the rows that are always kept, or too many rows.
    pub fn plan(&self, _: &Device) -> Result<TopkPlan> {
        let all = self.members.saturating_mul(self.rows);
        let parts = self.rows.div_ceil(PART).max(1);
        let ctas = self.batch.saturating_mul(self.members).saturating_mul(parts);
        if all > 1 << 30 || self.members > 1 << 20 || ctas > i32::MAX as usize {
            let [b, h, t] = [self.batch, self.members, self.rows];
            return invalid("rows", format!("{b} sets of {h} by {t} scores are too many for one launch"));
        }
        if self.members == 0 {
            return invalid("members", "a set has at least one row");
        }
        if self.strict && self.sink_rows + self.recent_rows > 0 {
            return invalid("strict", "not beside sinks and recent rows");
        }
        let forced = self.members * self.sink_rows.saturating_add(self.recent_rows).min(self.rows);
        if self.k < forced {
            return invalid("k", format!("{} is less than the {forced} sink and recent rows", self.k));
        }
        if self.k > i32::MAX as usize {
            return invalid("k", format!("{} is more than rows can be", self.k));
        }
        let one_cta = self.members == 1 && self.rows <= ROW_OF_A_CTA && !self.strict;
        Ok(TopkPlan { shape: *self, parts: (!one_cta).then_some(parts) })
    }
}

impl TopkPlan {
    /// What it was made from.
    pub fn shape(&self) -> &TopkShape {
        &self.shape
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        let TopkShape { batch, members, rows, .. } = self.shape;
        match self.parts {
            None => WorkspaceSize::default(),
            Some(_) => WorkspaceSize { zeroed: 4 * batch * (SCORE_BINS + 2), scratch: 8 * batch * (1 + members * rows) },
        }
    }

    /// Enqueues one launch where a CTA takes a row of up to 32K scores, else two, and a third where more than cuts is asked
    /// for; none without sets.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut TopkArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        let (all, stride) = (batch * members, args.score_stride.unwrap_or(rows));
        if stride < rows && all > 1 {
            return invalid("score_stride", format!("{stride} is less than {rows} scores"));
        }
        if all > 0 {
            within("scores", &args.scores, 4 * ((all - 1) * stride + rows), 4)?;
        }
        if let Some(lengths) = &args.lengths {
            within("lengths", lengths, 4 * all, 4)?;
        }
        let (ks, k_stride) = match &args.ks {
            None => (0, 0),
            Some(Ks::One(one)) => {
                within("ks", one, 4, 4)?;
                (one.address(), 0)
            }
            Some(Ks::Each(each)) => {
                within("ks", each, 4 * batch, 4)?;
                (each.address(), 1)
            }
        };
        if args.selected.is_some() && members > 1 {
            return invalid("selected", "lists are for sets of one row: take counts, or masks");
        }
        let output = |name, view: &Option<ViewMut<'_>>, bytes, align| match view {
            None => Ok(0),
            Some(view) => within(name, view, bytes, align).map(|()| view.address()),
        };
        let scratch = workspace.scratch(self.workspace())?;
        let mut params = abi::KvlarTopk {
            scores: args.scores.address(),
            lengths: args.lengths.map_or(0, |x| x.address()),
            ks,
            k_stride,
            score_stride: stride as i64,
            cuts: output("cuts", &args.cuts, 8 * batch, 8)?,
            counts: output("counts", &args.counts, 4 * all, 4)?,
            selected: output("selected", &args.selected, 4 * batch * k, 4)?,
            mask: output("mask", &args.mask, all * rows, 1)?,
            ..self.bare_params()
        };
        if self.parts.is_some() {
            let zeroed = |words: usize| scratch.zeroed + 4 * words as u64;
            params.bins = zeroed(0);
            params.found = zeroed(batch * SCORE_BINS);
            params.counters = zeroed(batch * (SCORE_BINS + 1));
            params.candidates = scratch.scratch + 8 * batch as u64;
            params.cuts = if params.cuts == 0 { scratch.scratch } else { params.cuts };
        }
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct with everything that follows from the shape; addresses are 0, strides those of dense scores.
    pub fn bare_params(&self) -> abi::KvlarTopk {
        let s = &self.shape;
        abi::KvlarTopk {
            score_stride: s.rows as i64,
            rows: (s.batch * s.members) as u32,
            row_count: s.rows as u32,
            k: s.k as u32,
            sink_rows: s.sink_rows.min(s.rows) as u32,
            recent_rows: s.recent_rows.min(s.rows) as u32,
            members: s.members as u32,
            parts: self.parts.unwrap_or(1) as u32,
            strict: s.strict.into(),
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launches.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`TopkPlan::bare_params`] fills in all that is not an address), its addresses are valid
    /// on the stream's device until the launches have run, and where there is scratch ([`TopkPlan::workspace`]) `bins`, `found`
    /// and `counters` point to zeros, `candidates` and `cuts` to 8 bytes a score and a set.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarTopk) -> Result<()> {
        let rows = self.shape.batch * self.shape.members;
        if rows == 0 {
            return Ok(());
        }
        let launch = |entry, grid: usize| Launch { entry, grid: grid as u32, block: 1024, shared_bytes: 0 };
        let Some(parts) = self.parts else {
            // SAFETY: the caller's promise, as below.
            return unsafe { stream.enqueue(launch("kvlar_topk", rows), params) };
        };
        // SAFETY: see above.
        unsafe {
            stream.enqueue(launch("kvlar_topk_bins", rows * parts), params)?;
            stream.enqueue(launch("kvlar_topk_cut", rows * parts), params)?;
            if params.counts != 0 || params.selected != 0 || params.mask != 0 {
                stream.enqueue(launch("kvlar_topk_apply", rows), params)?;
            }
        }
        Ok(())
    }
}
