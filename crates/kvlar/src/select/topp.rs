//! The fewest rows that hold a share of the softmax mass.

use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::{Device, Memory, Resolve, Result, SCORE_BINS, Stream, View, ViewMut, abi};

/// What [`ToppPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ToppShape {
    /// R: rows, each of which chooses for itself.
    pub batch: usize,
    /// T: logits of a row, up to 2²².
    pub rows: usize,
    /// Share of the softmax mass that is kept, 0..=1 (0.9).
    pub top_p: f64,
    /// Least number of rows, where there are so many with mass (1).
    pub k_min: usize,
    /// Greatest number of rows (T); wins over `k_min`, but not over rows that are always kept.
    pub k_max: usize,
    /// First logits of a row that are always kept; they count towards `top_p`, `k_min` and `k_max`.
    pub sink_rows: usize,
    /// Last logits of a row's length that are; likewise.
    pub recent_rows: usize,
    /// Row by row, or in steps of 1/16 of a logit below the largest, which takes two passes less.
    pub resolve: Resolve,
}

impl ToppShape {
    /// Nine tenths of the mass of each of `batch` rows, row by row.
    pub fn new(batch: usize, rows: usize) -> Self {
        Self { batch, rows, top_p: 0.9, k_min: 1, k_max: rows, sink_rows: 0, recent_rows: 0, resolve: Resolve::Exact }
    }

    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a `top_p` outside 0..=1, or too many rows.
    pub fn plan(&self, _: &Device) -> Result<ToppPlan> {
        if !(0.0..=1.0).contains(&self.top_p) {
            return invalid("top_p", format!("{} is outside 0..=1", self.top_p));
        }
        if self.rows > MAX_ROWS || self.batch.saturating_mul(self.rows.max(1)) > 1 << 40 || self.batch > i32::MAX as usize {
            return invalid("rows", format!("{} rows of {} logits are too many for one launch", self.batch, self.rows));
        }
        Ok(ToppPlan { shape: *self })
    }
}

/// So that sums of masses are exact enough: see `kernels/select/topp.cu`.
const MAX_ROWS: usize = 1 << 22;

/// A validated selection by mass. `Copy`, holds no handles, needs no workspace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ToppPlan {
    shape: ToppShape,
}

/// Arguments of [`ToppPlan::launch`].
#[derive(Debug)]
pub struct ToppArgs<'a> {
    /// f32 `[R, T]`.
    pub logits: View<'a>,
    /// Logits between the first ones of two rows; `None`: T.
    pub logit_stride: Option<usize>,
    /// How many logits there are, i32 `[R / length_rows]`; `None`: T. Others are clamped to 0..=T.
    pub lengths: Option<View<'a>>,
    /// Neighbouring rows that share a length: 1, or those of a sequence's heads.
    pub length_rows: usize,
    /// u32 `[R, SCORE_BINS]` of these logits and lengths, as [`crate::TopkArgs::histogram`]. It says nothing of masses: it
    /// saves a pass where `k_min` or `k_max` decides.
    pub histogram: Option<View<'a>>,
    /// (k_min, k_max), i32 `[2]`, in place of the shape's.
    pub limits: Option<View<'a>>,
    /// u64 `[R]`, each a cut that keeps just these rows.
    pub cuts: Option<ViewMut<'a>>,
    /// i32 `[R]`.
    pub counts: Option<ViewMut<'a>>,
    /// f32 `[R]`: the share of the mass that is kept; 0 where there is none.
    pub mass: Option<ViewMut<'a>>,
    /// i32 `[R, T]`: the rows, ascending, −1 behind the last.
    pub selected: Option<ViewMut<'a>>,
    /// u8 `[R, T]`: 1 for a row that is kept.
    pub mask: Option<ViewMut<'a>>,
}

impl<'a> ToppArgs<'a> {
    /// Of logits one row after the other, all of them; no output yet.
    pub fn new(logits: View<'a>) -> Self {
        let (logit_stride, lengths, histogram, limits) = (None, None, None, None);
        let (cuts, counts, mass, selected, mask) = (None, None, None, None, None);
        Self { logits, logit_stride, lengths, length_rows: 1, histogram, limits, cuts, counts, mass, selected, mask }
    }
}

impl ToppPlan {
    /// What it was made from.
    pub fn shape(&self) -> &ToppShape {
        &self.shape
    }

    /// Enqueues one launch; none without rows.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ToppArgs<'_>) -> Result<()> {
        let ToppShape { batch, rows, .. } = self.shape;
        let stride = args.logit_stride.unwrap_or(rows);
        if stride < rows && batch > 1 {
            return invalid("logit_stride", format!("{stride} is less than {rows} logits"));
        }
        if batch > 0 {
            within("logits", &args.logits, 4 * ((batch - 1) * stride + rows), 4)?;
        }
        if args.length_rows == 0 || !batch.is_multiple_of(args.length_rows) {
            return invalid("length_rows", format!("{} does not divide {batch} rows", args.length_rows));
        }
        let inputs = [
            ("lengths", &args.lengths, batch / args.length_rows),
            ("histogram", &args.histogram, batch * SCORE_BINS),
            ("limits", &args.limits, 2),
        ];
        for (name, view, elements) in inputs {
            if let Some(view) = view {
                within(name, view, 4 * elements, 4)?;
            }
        }
        let output = |name, view: &Option<ViewMut<'_>>, bytes, align| match view {
            None => Ok(0),
            Some(view) => within(name, view, bytes, align).map(|()| view.address()),
        };
        let address = |view: Option<View<'_>>| view.map_or(0, |x| x.address());
        let bare = self.bare_params();
        let params = abi::KvlarTopp {
            rows: abi::KvlarTopk {
                scores: args.logits.address(),
                score_stride: stride as i64,
                lengths: address(args.lengths),
                length_rows: args.length_rows as u32,
                histogram: address(args.histogram),
                cuts: output("cuts", &args.cuts, 8 * batch, 8)?,
                counts: output("counts", &args.counts, 4 * batch, 4)?,
                selected: output("selected", &args.selected, 4 * batch * rows, 4)?,
                mask: output("mask", &args.mask, batch * rows, 1)?,
                ..bare.rows
            },
            mass: output("mass", &args.mass, 4 * batch, 4)?,
            limits: address(args.limits),
            ..bare
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct with everything that follows from the shape; addresses are 0, strides those of dense logits.
    pub fn bare_params(&self) -> abi::KvlarTopp {
        let s = &self.shape;
        let count = |rows: usize| rows.min(s.rows) as u32;
        abi::KvlarTopp {
            rows: abi::KvlarTopk {
                score_stride: s.rows as i64,
                rows: s.batch as u32,
                row_count: s.rows as u32,
                k: s.rows as u32,
                sink_rows: count(s.sink_rows),
                recent_rows: count(s.recent_rows),
                members: 1,
                parts: 1,
                set_rows: 1,
                length_rows: 1,
                ..Default::default()
            },
            top_p: s.top_p,
            k_min: count(s.k_min),
            k_max: count(s.k_max),
            // Their sum has at most 62 bits.
            weight_log2: 62 - s.rows.next_power_of_two().ilog2(),
            in_bins: (s.resolve == Resolve::Bin).into(),
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ToppPlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarTopp) -> Result<()> {
        if self.shape.batch == 0 {
            return Ok(());
        }
        let launch = Launch { entry: "kvlar_topp", grid: self.shape.batch as u32, block: 1024, shared_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(launch, params) }
    }
}
