//! Scores of cached rows: what eviction ranks them by, the highest being kept. By the attention that they get, by what keys and
//! values say by themselves, by gates of hidden states.

mod gate;
mod keys;
mod plan;
mod shape;

pub use gate::{GateWeights, ScoreGateArgs, ScoreGatePlan, ScoreGateShape};
pub(crate) use keys::method as key_method;
pub use keys::{KeyScores, KeySums, ScoreKeysArgs, ScoreKeysPlan, ScoreKeysShape};
pub use plan::{ScoreArgs, ScorePlan};
pub use shape::{Pooling, ScoreReduction, ScoreShape, ScoredRows};

use crate::paged::within;
use crate::{Memory, Result};

/// Scores `[seqs][heads][columns]` at strides (sequence, head), in elements; `None`: dense.
fn score_strides(memory: &impl Memory, strides: Option<[usize; 2]>, [seqs, heads, columns]: [usize; 3]) -> Result<[usize; 2]> {
    let strides = strides.unwrap_or([heads * columns, columns]);
    if seqs * heads * columns > 0 {
        let last = (seqs - 1).saturating_mul(strides[0]).saturating_add((heads - 1).saturating_mul(strides[1]));
        within("scores", memory, last.saturating_add(columns).saturating_mul(4), 4)?;
    }
    Ok(strides)
}
