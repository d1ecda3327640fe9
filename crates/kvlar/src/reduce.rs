//! One score a row and kv head, from the logits of query heads.

use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::scan::{SCORE_BINS, method};
use crate::{Device, Memory, Reduction, Result, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

/// What [`ReducePlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReduceShape {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// T.
    pub rows: usize,
    /// How the query heads of a kv head share a score.
    pub method: Reduction,
    /// Whether a histogram of the scores is an output.
    pub histogram: bool,
    /// Rows beyond a length get −∞; else they are left as they are.
    pub fill: bool,
}

/// A validated reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReducePlan {
    shape: ReduceShape,
    /// CTAs a (sequence, kv head).
    blocks: usize,
}

/// Arguments of [`ReducePlan::launch`].
#[derive(Debug)]
pub struct ReduceArgs<'a> {
    /// f32 `[B, Hq, T]`.
    pub logits: View<'a>,
    /// f32 `[B, Hq]`; [`Reduction::MaxProb`] needs it.
    pub lse: Option<View<'a>>,
    /// Rows held, i32 `[B]` or `[B, Hk]`; `None`: all.
    pub lengths: Option<View<'a>>,
    /// Whether there is a length for each kv head.
    pub lengths_per_head: bool,
    /// f32 `[B, Hk, T]`.
    pub scores: ViewMut<'a>,
    /// u32 `[B, Hk, SCORE_BINS]` ([`SCORE_BINS`]), of the scores of rows held; there as the shape says.
    pub histogram: Option<ViewMut<'a>>,
}

/// Rows a CTA of `kernels/reduce/reduce.cu`.
const ROWS: usize = 1024;

impl ReduceShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for heads that do not divide or too many rows.
    pub fn plan(&self, _: &Device) -> Result<ReducePlan> {
        if self.kv_heads == 0 || self.q_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return invalid("q_heads", format!("{} query heads are not a multiple of {} kv heads", self.q_heads, self.kv_heads));
        }
        let blocks = self.rows.div_ceil(ROWS);
        if self.rows > 1 << 30 || (self.seqs * self.kv_heads).saturating_mul(blocks.max(1)) > i32::MAX as usize {
            return invalid(
                "rows",
                format!("{} rows of {} heads are too many for one launch", self.rows, self.seqs * self.kv_heads),
            );
        }
        Ok(ReducePlan { shape: *self, blocks })
    }
}

impl ReducePlan {
    /// What it was made from.
    pub fn shape(&self) -> &ReduceShape {
        &self.shape
    }

    /// Scratch that launches need: the counts of a histogram.
    pub fn workspace(&self) -> WorkspaceSize {
        let heads = self.shape.seqs * self.shape.kv_heads;
        WorkspaceSize { zeroed: if self.shape.histogram { 4 * heads * (1 + SCORE_BINS) } else { 0 }, scratch: 0 }
    }

    /// Enqueues one launch; none if there are no rows (a histogram is then left as it is).
    ///
    /// A NaN logit counts as the least of its group, so that it shows in a maximum only where all are NaN; a mean with one is
    /// NaN. A row that no query sees (logit −∞) has score −∞, also in a head that sees none (lse −∞).
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ReduceArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let s = &self.shape;
        let (heads, queries) = (s.seqs * s.kv_heads, s.seqs * s.q_heads);
        within("logits", &args.logits, 4 * queries * s.rows, 4)?;
        within("scores", &args.scores, 4 * heads * s.rows, 4)?;
        match &args.lse {
            Some(lse) => within("lse", lse, 4 * queries, 4)?,
            None if s.method == Reduction::MaxProb => return invalid("lse", "max_prob needs it"),
            None => {}
        }
        if let Some(lengths) = &args.lengths {
            within("lengths", lengths, 4 * if args.lengths_per_head { heads } else { s.seqs }, 4)?;
        }
        match &args.histogram {
            Some(_) if !s.histogram => return invalid("histogram", "the shape has none"),
            Some(histogram) => within("histogram", histogram, 4 * heads * SCORE_BINS, 4)?,
            None => {}
        }
        let scratch = workspace.scratch(self.workspace())?;
        let params = abi::KvlarReduce {
            logits: args.logits.address(),
            lse: args.lse.map_or(0, |x| x.address()),
            scores: args.scores.address(),
            histogram: args.histogram.as_ref().map_or(0, Memory::address),
            lengths: args.lengths.map_or(0, |x| x.address()),
            length_seq_stride: if args.lengths_per_head { s.kv_heads as i64 } else { 1 },
            length_head_stride: args.lengths_per_head.into(),
            ..self.with_scratch(scratch.zeroed)
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct with everything that follows from the shape, and counters at `zeroed` where it has a use for them.
    pub(crate) fn with_scratch(&self, zeroed: u64) -> abi::KvlarReduce {
        if !self.shape.histogram {
            return self.bare_params();
        }
        let heads = self.shape.seqs * self.shape.kv_heads;
        abi::KvlarReduce { counters: zeroed, counts: zeroed + 4 * heads as u64, ..self.bare_params() }
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarReduce {
        let s = &self.shape;
        abi::KvlarReduce {
            seqs: s.seqs as u32,
            kv_heads: s.kv_heads as u32,
            group: (s.q_heads / s.kv_heads) as u32,
            row_count: s.rows as u32,
            method: method(s.method),
            fill: s.fill.into(),
            blocks: self.blocks as u32,
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ReducePlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarReduce) -> Result<()> {
        let grid = self.shape.seqs * self.shape.kv_heads * self.blocks;
        if grid == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(Launch { entry: "kvlar_reduce", grid: grid as u32, block: 256, shared_bytes: 0 }, params) }
    }
}
