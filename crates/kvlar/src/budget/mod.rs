//! Budgets on the device: how many rows each layer, or each head of a layer, may keep, without a decision of the host.
//!
//! What comes out is what [`crate::TopkPlan`] reads as [`crate::Ks`], on request a number a row of scores.

mod heads;
mod layers;

pub use heads::{BudgetHeadsArgs, BudgetHeadsPlan, BudgetHeadsShape};
pub use layers::{BudgetLayersArgs, BudgetLayersPlan, BudgetLayersShape};

use crate::error::invalid;
use crate::paged::within;
use crate::{Memory, Result, SCORE_BINS, Stream, TopkShape, View, ViewMut, abi};

/// Scores that budgets are read off, of sequences, layers and heads: the first dimensions, in rows.
#[derive(Clone, Copy, Debug)]
struct Scores {
    seqs: usize,
    layers: usize,
    heads: usize,
    rows: usize,
}

/// Addresses of what both kinds of budgets take.
#[derive(Clone, Copy, Debug)]
struct Given {
    scores: u64,
    stride: usize,
    lengths: u64,
    histogram: u64,
}

impl Scores {
    fn check(&self, base: usize) -> Result<()> {
        let Self { seqs, layers, heads, rows } = *self;
        let each = layers.saturating_mul(heads).saturating_mul(rows.max(1));
        if each > 1 << 30 || seqs.saturating_mul(layers).saturating_mul(heads) > i32::MAX as usize {
            return invalid("rows", format!("{seqs} sequences of {layers} by {heads} by {rows} scores are too many"));
        }
        if base > i32::MAX as usize {
            return invalid("base", format!("{base} is more than rows can be"));
        }
        Ok(())
    }

    /// Checks arguments; scores that are not needed may be missing.
    fn given(
        &self,
        scores: Option<View<'_>>,
        stride: Option<usize>,
        lengths: Option<View<'_>>,
        histogram: Option<View<'_>>,
    ) -> Result<Given> {
        let (all, stride) = (self.seqs * self.layers * self.heads, stride.unwrap_or(self.rows));
        if stride < self.rows && all > 1 {
            return invalid("score_stride", format!("{stride} is less than {} scores", self.rows));
        }
        if let (Some(scores), 1..) = (&scores, all) {
            within("scores", scores, 4 * ((all - 1) * stride + self.rows), 4)?;
        }
        if let Some(lengths) = &lengths {
            within("lengths", lengths, 4 * self.seqs, 4)?;
        }
        if let Some(histogram) = &histogram {
            within("histogram", histogram, 4 * all * SCORE_BINS, 4)?;
        }
        let address = |x: Option<View<'_>>| x.map_or(0, |x| x.address());
        Ok(Given { scores: address(scores), stride, lengths: address(lengths), histogram: address(histogram) })
    }

    /// Enqueues the counting, a row, of the best `best` scores of each of some sets of rows, whose scores lie `set_rows` apart.
    fn count(&self, stream: &Stream, given: Given, counting: Counting, (zeroed, scratch, counts): (u64, u64, u64)) -> Result<()> {
        let plan = counting.topk(self.rows).checked()?;
        let mut params = abi::KvlarTopk {
            scores: given.scores,
            score_stride: given.stride as i64,
            lengths: given.lengths,
            length_rows: (self.layers * self.heads) as u32,
            histogram: given.histogram,
            set_rows: counting.set_rows as u32,
            counts,
            ..plan.bare_params()
        };
        plan.put_scratch(&mut params, (zeroed, scratch));
        // SAFETY: every address was checked against the shape.
        unsafe { plan.launch_raw(stream, &params) }
    }
}

/// Sets of rows, and how many best scores of each are counted.
#[derive(Clone, Copy, Debug)]
struct Counting {
    sets: usize,
    members: usize,
    set_rows: usize,
    best: usize,
}

impl Counting {
    fn topk(&self, rows: usize) -> TopkShape {
        // No more than there are: then all are counted.
        TopkShape { members: self.members, ..TopkShape::new(self.sets, rows, self.best.min(self.members * rows)) }
    }
}

/// Checks outputs: a budget each, and a number of rows for each of `heads`.
fn outputs(budgets: &ViewMut<'_>, ks: &Option<ViewMut<'_>>, each: usize, rows: usize) -> Result<(u64, u64)> {
    within("budgets", budgets, 4 * each, 4)?;
    if let Some(ks) = ks {
        within("ks", ks, 4 * rows, 4)?;
    }
    Ok((budgets.address(), ks.as_ref().map_or(0, Memory::address)))
}
