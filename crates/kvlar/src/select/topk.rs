//! The k largest scores of rows, and of sets of rows.

use super::Ks;
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
    /// 2601.17668, as released). There must be no sinks and recent rows, and no floor.
    pub strict: bool,
    /// Largest scores of each row that are kept first, and counted, before rows compete for what is left of k; those that are
    /// always kept are not among them. Fewer where a length has fewer.
    pub floor: usize,
}

impl TopkShape {
    /// The `k` largest of each of `batch` rows.
    pub fn new(batch: usize, rows: usize, k: usize) -> Self {
        Self { batch, members: 1, rows, k, sink_rows: 0, recent_rows: 0, strict: false, floor: 0 }
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
pub(crate) const ROW_OF_A_CTA: usize = 32 << 10;
/// Scores a CTA of `kernels/select/set.cu`.
const PART: usize = 8192;

/// Arguments of [`TopkPlan::launch`].
#[derive(Debug)]
pub struct TopkArgs<'a> {
    /// f32 `[R, H, T]`.
    pub scores: View<'a>,
    /// Scores between the first ones of two rows; `None`: T.
    pub score_stride: Option<usize>,
    /// How many scores there are of each row, i32 `[R * H / length_rows]`; `None`: T. Others are clamped to 0..=T.
    pub lengths: Option<View<'a>>,
    /// Neighbouring rows that share a length: 1, or H where a sequence's heads have the same.
    pub length_rows: usize,
    /// u32 `[R, H, SCORE_BINS]` ([`SCORE_BINS`]), how many scores of each length are in each bin, as [`crate::ScanPlan`] and
    /// [`crate::ReducePlan`] write it: then the scores are read once less, and sets of one row take a launch less. One of
    /// other scores or lengths gives a wrong cut.
    pub histogram: Option<View<'a>>,
    /// How many are kept; `None`: the shape's k, which is the most. Rows that are always kept are, whatever it says.
    pub ks: Option<Ks<'a>>,
    /// u64 `[R]`, each a cut that keeps just these rows; `[R, H]`, one for each row, where there is a floor.
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
        let (score_stride, lengths, histogram, ks) = (None, None, None, None);
        Self { scores, score_stride, lengths, length_rows: 1, histogram, ks, cuts, counts, selected, mask }
    }
}

impl TopkShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a k below the rows that are always kept, or too many rows.
    pub fn plan(&self, _: &Device) -> Result<TopkPlan> {
        self.checked()
    }

    /// Rows that are always kept of each, where there are so many.
    fn forced(&self) -> usize {
        self.sink_rows.saturating_add(self.recent_rows).min(self.rows)
    }

    pub(crate) fn checked(&self) -> Result<TopkPlan> {
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
        if self.strict && (self.forced() > 0 || self.floor > 0) {
            return invalid("strict", "not beside sinks and recent rows, or a floor");
        }
        let forced = self.members * self.forced();
        if self.k < forced {
            return invalid("k", format!("{} is less than the {forced} sink and recent rows", self.k));
        }
        let floors = self.members * self.floor.min(self.rows - self.forced());
        if self.k < forced + floors {
            return invalid(
                "k",
                format!("{} is less than floors of {} rows each, {floors}, and {forced} rows", self.k, self.floor),
            );
        }
        if self.k > i32::MAX as usize {
            return invalid("k", format!("{} is more than rows can be", self.k));
        }
        let one_cta = self.members == 1 && self.rows <= ROW_OF_A_CTA && !self.strict && self.floor == 0;
        Ok(TopkPlan { shape: *self, parts: (!one_cta).then_some(parts) })
    }
}

impl TopkPlan {
    /// What it was made from.
    pub fn shape(&self) -> &TopkShape {
        &self.shape
    }

    /// How many cuts there are.
    fn cuts(&self) -> usize {
        let TopkShape { batch, members, floor, .. } = self.shape;
        if floor > 0 { batch * members } else { batch }
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        let TopkShape { batch, members, rows, .. } = self.shape;
        match self.parts {
            None => WorkspaceSize::default(),
            Some(_) => {
                WorkspaceSize { zeroed: 4 * batch * (SCORE_BINS + 2), scratch: 8 * (self.cuts() + batch * members * rows) }
            }
        }
    }

    /// Enqueues one launch where a CTA takes a row of up to 32K scores, else two (one, for sets of one row with a histogram),
    /// and one more each for a floor and where more than cuts is asked for; none without sets.
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
        if args.length_rows == 0 || !all.is_multiple_of(args.length_rows) {
            return invalid("length_rows", format!("{} does not divide {all} rows", args.length_rows));
        }
        if let Some(lengths) = &args.lengths {
            within("lengths", lengths, 4 * (all / args.length_rows), 4)?;
        }
        if let Some(histogram) = &args.histogram {
            within("histogram", histogram, 4 * all * SCORE_BINS, 4)?;
        }
        let (ks, k_stride) = Ks::checked(&args.ks, batch)?;
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
            length_rows: args.length_rows as u32,
            histogram: args.histogram.map_or(0, |x| x.address()),
            ks,
            k_stride,
            score_stride: stride as i64,
            cuts: output("cuts", &args.cuts, 8 * self.cuts(), 8)?,
            counts: output("counts", &args.counts, 4 * all, 4)?,
            selected: output("selected", &args.selected, 4 * batch * k, 4)?,
            mask: output("mask", &args.mask, all * rows, 1)?,
            ..self.bare_params()
        };
        self.put_scratch(&mut params, (scratch.zeroed, scratch.scratch));
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Fills in scratch of [`TopkPlan::workspace`], and cuts where they are no output.
    pub(crate) fn put_scratch(&self, params: &mut abi::KvlarTopk, (zeroed, scratch): (u64, u64)) {
        if self.parts.is_none() {
            return;
        }
        let (batch, at) = (self.shape.batch, |words: usize| zeroed + 4 * words as u64);
        params.bins = at(0);
        params.found = at(batch * SCORE_BINS);
        params.counters = at(batch * (SCORE_BINS + 1));
        params.candidates = scratch + 8 * self.cuts() as u64;
        if params.cuts == 0 {
            params.cuts = scratch;
        }
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
            floor: s.floor.min(s.rows) as u32,
            set_rows: s.members as u32,
            length_rows: 1,
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
    /// and `counters` point to zeros, `candidates` and `cuts` to 8 bytes a score and a set (a row, with a floor).
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
            if self.shape.floor > 0 {
                // The cut that keeps the best of each row, beside those that are always kept.
                let k = params.sink_rows.saturating_add(params.recent_rows).min(params.row_count) + params.floor;
                let alone = abi::KvlarTopk { k, ks: 0, floor: 0, counts: 0, selected: 0, mask: 0, ..*params };
                stream.enqueue(launch("kvlar_topk", rows), &alone)?;
            }
            // Histograms are of floors too.
            let histogram = if self.shape.floor > 0 { 0 } else { params.histogram };
            let params = &abi::KvlarTopk { histogram, ..*params };
            match histogram {
                0 => stream.enqueue(launch("kvlar_topk_bins", rows * parts), params)?,
                _ if self.shape.members == 1 => {}
                _ => stream.enqueue(launch("kvlar_topk_bins", rows), &abi::KvlarTopk { parts: 1, ..*params })?,
            }
            stream.enqueue(launch("kvlar_topk_cut", rows * parts), params)?;
            if params.counts != 0 || params.selected != 0 || params.mask != 0 {
                stream.enqueue(launch("kvlar_topk_apply", rows), params)?;
            }
        }
        Ok(())
    }
}
