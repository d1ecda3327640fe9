//! How many rows the heads of each layer keep.

use super::{Counting, Scores, outputs};
use crate::device::Launch;
use crate::error::invalid;
use crate::{Device, LayerBudget, Result, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

/// What [`BudgetLayersPlan`] is made from. Start from [`BudgetLayersShape::new`] and change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetLayersShape {
    /// How rows are shared out.
    pub method: LayerBudget,
    /// B: sequences, each for itself.
    pub seqs: usize,
    /// L, up to 1024.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// P: capacity of a row of scores; rows that are always kept have none.
    pub rows: usize,
    /// Rows of a head, on average over layers.
    pub base: usize,
    /// DynamicKV: a layer keeps at most this times `base`, from the start (10).
    pub r_max: f64,
    /// DynamicKV: layers between two rounds (4).
    pub interval: usize,
    /// PyramidKV: how many times less than `base` the last layer keeps (20).
    pub beta: usize,
    /// Rows that are always kept, added to what `ks` says (0).
    pub forced_rows: usize,
}

/// Validated budgets of layers. `Copy`, holds no handles; reusable across steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetLayersPlan {
    shape: BudgetLayersShape,
}

/// Arguments of [`BudgetLayersPlan::launch`] and [`BudgetLayersPlan::round`].
#[derive(Debug)]
pub struct BudgetLayersArgs<'a> {
    /// f32 `[B, L, H, P]`, of the layers seen; DynamicKV alone needs them.
    pub scores: Option<View<'a>>,
    /// Scores between the first ones of two rows; `None`: P.
    pub score_stride: Option<usize>,
    /// How many scores there are of each sequence, i32 `[B]`; `None`: P. Others are clamped to 0..=P.
    pub lengths: Option<View<'a>>,
    /// u32 `[B, L, H, SCORE_BINS]`, as [`crate::TopkArgs::histogram`].
    pub histogram: Option<View<'a>>,
    /// i32 `[B, L]`; of rounds also what the round before has left there. Layers that no round has seen have what they may
    /// keep until then.
    pub budgets: ViewMut<'a>,
    /// i32 `[B, L, H]`: the same for each row of scores, and `forced_rows` more.
    pub ks: Option<ViewMut<'a>>,
}

/// Layers that a CTA has threads for.
const MAX_LAYERS: usize = 1024;
/// So that products of PyramidKV's line fit 64 bits.
const MAX_BETA: usize = 1 << 20;

impl BudgetLayersShape {
    /// Of `[B, L, H]` rows of P scores.
    pub fn new(method: LayerBudget, [seqs, layers, heads]: [usize; 3], rows: usize, base: usize) -> Self {
        Self { method, seqs, layers, heads, rows, base, r_max: 10.0, interval: 4, beta: 20, forced_rows: 0 }
    }

    fn scores(&self) -> Scores {
        Scores { seqs: self.seqs, layers: self.layers, heads: self.heads, rows: self.rows }
    }

    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for too many layers or scores, a `base` above i32, an `r_max` that is not a finite number above
    /// 0, an `interval` of 0 or a `beta` outside 1..=2²⁰; whatever the method is.
    pub fn plan(&self, _: &Device) -> Result<BudgetLayersPlan> {
        self.scores().check(self.base)?;
        if self.layers > MAX_LAYERS {
            return invalid("layers", format!("{} are more than {MAX_LAYERS}", self.layers));
        }
        if !(self.r_max > 0.0 && self.r_max.is_finite()) {
            return invalid("r_max", format!("{} is not a finite number above 0", self.r_max));
        }
        if self.interval == 0 {
            return invalid("interval", "0; it must be at least 1");
        }
        if self.beta == 0 || self.beta > MAX_BETA {
            return invalid("beta", format!("{} is outside 1..={MAX_BETA}", self.beta));
        }
        if self.forced_rows > 1 << 30 {
            return invalid("forced_rows", format!("{} are more than rows can be", self.forced_rows));
        }
        let plan = BudgetLayersPlan { shape: *self };
        if plan.counts() && self.layers > 0 {
            plan.counting(self.layers).topk(self.rows).checked()?;
        }
        Ok(plan)
    }
}

impl BudgetLayersPlan {
    /// What it was made from.
    pub fn shape(&self) -> &BudgetLayersShape {
        &self.shape
    }

    /// After how many layers there is a round: every `interval`, and after the last. One alone but for DynamicKV.
    pub fn rounds(&self) -> impl Iterator<Item = usize> + use<> {
        let BudgetLayersShape { layers, interval, method, .. } = self.shape;
        let step = if method == LayerBudget::DynamicKv { interval } else { layers.max(1) };
        (0..layers).step_by(step).map(move |first| first.saturating_add(step).min(layers))
    }

    /// The best scores that the round after `seen` layers counts.
    fn counting(&self, seen: usize) -> Counting {
        let BudgetLayersShape { seqs, layers, heads, base, .. } = self.shape;
        let members = seen * heads;
        Counting { sets: seqs, members, set_rows: layers * heads, best: base.saturating_mul(members) }
    }

    /// Whether there are scores to count.
    fn counts(&self) -> bool {
        self.shape.method == LayerBudget::DynamicKv && self.shape.heads > 0
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        let BudgetLayersShape { seqs, layers, heads, rows, .. } = self.shape;
        if !self.counts() || layers == 0 {
            return WorkspaceSize::default();
        }
        let topk = self.counting(layers).topk(rows).checked().map(|plan| plan.workspace()).unwrap_or_default();
        WorkspaceSize { zeroed: topk.zeroed, scratch: topk.scratch + (4 * seqs * layers * heads).next_multiple_of(8) }
    }

    /// Enqueues all rounds: one launch for PyramidKV and uniform budgets, four a round for DynamicKV.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut BudgetLayersArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        self.rounds().try_for_each(|seen| self.round(stream, args, workspace, seen))
    }

    /// Enqueues the round after `seen` layers, one of [`BudgetLayersPlan::rounds`], those before which have run: budgets of the
    /// layers seen so far, which only shrink from round to round, and of the others what they may keep until their first.
    ///
    /// # Errors
    /// As [`BudgetLayersPlan::launch`].
    pub fn round(&self, stream: &Stream, args: &mut BudgetLayersArgs<'_>, workspace: &mut Workspace, seen: usize) -> Result<()> {
        let s = &self.shape;
        if !self.rounds().any(|round| round == seen) {
            return invalid("seen", format!("there is no round after {seen} layers"));
        }
        if s.method == LayerBudget::DynamicKv && args.scores.is_none() {
            return invalid("scores", "DynamicKV needs them");
        }
        let given = s.scores().given(args.scores, args.score_stride, args.lengths, args.histogram)?;
        let (budgets, ks) = outputs(&args.budgets, &args.ks, s.seqs * s.layers, s.seqs * s.layers * s.heads)?;
        let scratch = workspace.scratch(self.workspace())?;
        if s.seqs == 0 {
            return Ok(());
        }
        let counting = self.counting(seen);
        let mut params = abi::KvlarBudget { lengths: given.lengths, budgets, ks, ..self.bare_params(seen) };
        if self.counts() {
            params.counts = scratch.scratch;
            let behind = scratch.scratch + (4 * s.seqs * s.layers * s.heads).next_multiple_of(8) as u64;
            s.scores().count(stream, given, counting, (scratch.zeroed, behind, params.counts))?;
        }
        // SAFETY: every address was checked against the shape; counts are scratch.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct of a round's last launch, with everything that follows from the shape; addresses are 0.
    pub fn bare_params(&self, seen: usize) -> abi::KvlarBudget {
        let s = &self.shape;
        let most = ((s.r_max * s.base as f64).floor() as usize).min(s.rows);
        abi::KvlarBudget {
            beta: s.beta as u64,
            sets: s.seqs as u32,
            length_sets: 1,
            layers: s.layers as u32,
            heads: s.heads as u32,
            row_count: s.rows as u32,
            base: s.base as u32,
            forced: s.forced_rows as u32,
            method: match s.method {
                LayerBudget::DynamicKv => abi::KVLAR_BUDGET_DYNAMIC,
                LayerBudget::Pyramid => abi::KVLAR_BUDGET_PYRAMID,
                LayerBudget::Uniform => abi::KVLAR_BUDGET_UNIFORM,
            },
            seen: seen as u32,
            known: (seen.saturating_sub(1) / s.interval * s.interval) as u32,
            most: most as u32,
            ..Default::default()
        }
    }

    /// Enqueues the last launch of a round with the caller's own parameter struct, for engines that count for themselves.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`BudgetLayersPlan::bare_params`] fills in all that is not an address), and its addresses
    /// are valid on the stream's device until the launch has run; `counts` may be null but for DynamicKV.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarBudget) -> Result<()> {
        if self.shape.seqs == 0 || self.shape.layers == 0 {
            return Ok(());
        }
        let launch =
            Launch { entry: "kvlar_budget_layers", grid: self.shape.seqs as u32, block: MAX_LAYERS as u32, shared_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(launch, params) }
    }
}
