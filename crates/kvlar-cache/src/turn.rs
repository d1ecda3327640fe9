//! Whose step a batch serves.

use crate::error::invalid;
use crate::{BatchShape, CacheError, Result, SeqId};

/// A batch's cache, and the step that goes on with it: its sequences, with how many new tokens each.
#[derive(Debug)]
pub(crate) struct Turn {
    cache: u64,
    pub shape: BatchShape,
    pub new: Vec<(SeqId, usize)>,
}

impl Turn {
    pub fn new(cache: u64, shape: BatchShape) -> Result<Self> {
        let BatchShape { seqs, new_rows, .. } = shape;
        if seqs == 0 || new_rows == 0 {
            return invalid("batch", format!("{seqs} sequences of {new_rows} new tokens"));
        }
        Ok(Self { cache, shape, new: Vec::new() })
    }

    /// Whether a step of that cache, of these sequences, can begin as far as the batch goes.
    pub fn check_new(&self, cache: u64, new: &[(SeqId, usize)]) -> Result<()> {
        if let Some(&(seq, _)) = self.new.first() {
            return Err(CacheError::Busy(seq));
        }
        if self.cache != cache {
            return invalid("batch", "was made for another cache");
        }
        let BatchShape { seqs, new_rows, .. } = self.shape;
        if new.len() > seqs {
            return invalid("sequences", format!("{} in a batch of {seqs}", new.len()));
        }
        for (i, &(seq, tokens)) in new.iter().enumerate() {
            if tokens > new_rows {
                return invalid("new tokens", format!("{tokens} in a batch of {new_rows}"));
            }
            if new[..i].iter().any(|(other, _)| *other == seq) {
                return Err(CacheError::Busy(seq));
            }
        }
        Ok(())
    }

    /// Whether a step of that cache goes on.
    pub fn check(&self, cache: u64) -> Result<()> {
        if self.new.is_empty() || self.cache != cache {
            return invalid("batch", "no step of this cache has begun with it");
        }
        Ok(())
    }
}

/// Whether there is such a layer.
pub(crate) fn check_layer(layer: usize, layers: usize) -> Result<()> {
    if layer < layers { Ok(()) } else { invalid("layer", format!("{layer} of {layers}")) }
}
