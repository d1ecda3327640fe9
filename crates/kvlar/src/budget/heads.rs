//! How many rows each head of a layer keeps.

use super::{Counting, Scores, outputs};
use crate::device::Launch;
use crate::error::invalid;
use crate::{Device, Result, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

/// What [`BudgetHeadsPlan`] is made from: AdaKV (arXiv 2407.11550). Start from [`BudgetHeadsShape::new`] and change fields.
///
/// A head keeps (1 − alpha) c + ⌊alpha · base⌋ rows, c being how many of the `base` · H best scores of its layer are its own.
/// Each is rounded alone, halves to even, so that their sum may differ from `base` · H.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetHeadsShape {
    /// B: sequences.
    pub seqs: usize,
    /// L: layers, each for itself; 1 where they come one by one.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// P: capacity of a row of scores; rows that are always kept have none.
    pub rows: usize,
    /// Rows of a head, on average.
    pub base: usize,
    /// The share of `base` that every head gets, 0..=1 (0.5).
    pub alpha: f64,
    /// Rows that are always kept, added to what `ks` says (0).
    pub forced_rows: usize,
}

/// Validated budgets of heads. `Copy`, holds no handles; reusable across layers and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetHeadsPlan {
    shape: BudgetHeadsShape,
}

/// Arguments of [`BudgetHeadsPlan::launch`].
#[derive(Debug)]
pub struct BudgetHeadsArgs<'a> {
    /// f32 `[B, L, H, P]`.
    pub scores: View<'a>,
    /// Scores between the first ones of two rows; `None`: P.
    pub score_stride: Option<usize>,
    /// How many scores there are of each sequence, i32 `[B]`; `None`: P. Others are clamped to 0..=P.
    pub lengths: Option<View<'a>>,
    /// u32 `[B, L, H, SCORE_BINS]`, as [`crate::TopkArgs::histogram`].
    pub histogram: Option<View<'a>>,
    /// i32 `[B, L, H]`.
    pub budgets: ViewMut<'a>,
    /// i32 `[B, L, H]`: the same, and `forced_rows` more.
    pub ks: Option<ViewMut<'a>>,
}

impl BudgetHeadsShape {
    /// Of `[B, L, H]` rows of P scores.
    pub fn new([seqs, layers, heads]: [usize; 3], rows: usize, base: usize) -> Self {
        Self { seqs, layers, heads, rows, base, alpha: 0.5, forced_rows: 0 }
    }

    fn scores(&self) -> Scores {
        Scores { seqs: self.seqs, layers: self.layers, heads: self.heads, rows: self.rows }
    }

    fn counting(&self) -> Counting {
        let members = self.heads;
        Counting { sets: self.seqs * self.layers, members, set_rows: members, best: self.base.saturating_mul(members) }
    }

    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for too many scores, a `base` above i32, an `alpha` outside 0..=1.
    pub fn plan(&self, _: &Device) -> Result<BudgetHeadsPlan> {
        self.scores().check(self.base)?;
        if !(0.0..=1.0).contains(&self.alpha) {
            return invalid("alpha", format!("{} is outside 0..=1", self.alpha));
        }
        if self.forced_rows > 1 << 30 {
            return invalid("forced_rows", format!("{} are more than rows can be", self.forced_rows));
        }
        if self.heads > 0 {
            self.counting().topk(self.rows).checked()?;
        }
        Ok(BudgetHeadsPlan { shape: *self })
    }
}

impl BudgetHeadsPlan {
    /// What it was made from.
    pub fn shape(&self) -> &BudgetHeadsShape {
        &self.shape
    }

    fn all(&self) -> usize {
        self.shape.seqs * self.shape.layers * self.shape.heads
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        if self.all() == 0 {
            return WorkspaceSize::default();
        }
        let topk = self.shape.counting().topk(self.shape.rows).checked().map(|plan| plan.workspace()).unwrap_or_default();
        WorkspaceSize { zeroed: topk.zeroed, scratch: topk.scratch + (4 * self.all()).next_multiple_of(8) }
    }

    /// Enqueues four launches, or two where a layer has one head and up to 32K scores.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut BudgetHeadsArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let s = &self.shape;
        let given = s.scores().given(Some(args.scores), args.score_stride, args.lengths, args.histogram)?;
        let (budgets, ks) = outputs(&args.budgets, &args.ks, self.all(), self.all())?;
        let scratch = workspace.scratch(self.workspace())?;
        if self.all() == 0 {
            return Ok(());
        }
        let behind = scratch.scratch + (4 * self.all()).next_multiple_of(8) as u64;
        s.scores().count(stream, given, s.counting(), (scratch.zeroed, behind, scratch.scratch))?;
        let params = abi::KvlarBudget { counts: scratch.scratch, lengths: given.lengths, budgets, ks, ..self.bare_params() };
        // SAFETY: every address was checked against the shape; counts are scratch.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct of the last launch, with everything that follows from the shape; addresses are 0.
    pub fn bare_params(&self) -> abi::KvlarBudget {
        let s = &self.shape;
        abi::KvlarBudget {
            head_share: 1.0 - s.alpha,
            sets: (s.seqs * s.layers) as u32,
            length_sets: s.layers as u32,
            layers: 1,
            heads: s.heads as u32,
            row_count: s.rows as u32,
            base: s.base as u32,
            forced: s.forced_rows as u32,
            head_floor: (s.alpha * s.base as f64).floor() as u32,
            ..Default::default()
        }
    }

    /// Enqueues the last launch with the caller's own parameter struct, for engines that count for themselves.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`BudgetHeadsPlan::bare_params`] fills in all that is not an address), and its addresses
    /// are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarBudget) -> Result<()> {
        if self.all() == 0 {
            return Ok(());
        }
        let grid = self.all().div_ceil(256) as u32;
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(Launch { entry: "kvlar_budget_heads", grid, block: 256, shared_bytes: 0 }, params) }
    }
}
