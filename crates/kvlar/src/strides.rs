//! Strides of dense activations.

use crate::error::invalid;
use crate::paged::within;
use crate::{Dtype, Memory, Result};

/// Where (sequence, head, row) of a dense `[seq][head][row][dim]` tensor starts, in elements; dims are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// From one sequence to the next.
    pub seq: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one row to the next.
    pub row: usize,
}

impl Strides {
    /// `[seq][head][row][dim]`.
    pub const fn heads_first(heads: usize, rows: usize, dim: usize) -> Self {
        Self { seq: heads * rows * dim, head: rows * dim, row: dim }
    }

    /// `[seq][row][head][dim]`: what a projection gives.
    pub const fn rows_first(heads: usize, rows: usize, dim: usize) -> Self {
        Self { seq: heads * rows * dim, head: dim, row: heads * dim }
    }

    pub(crate) fn abi(&self) -> (i64, i64, i64) {
        (self.seq as i64, self.head as i64, self.row as i64)
    }

    /// That vectors of 16 bytes can be read at every row of `[seqs, heads, rows, dim]`, and that all of it is there.
    pub(crate) fn check(&self, arg: &'static str, memory: &impl Memory, dtype: Dtype, shape: [usize; 4]) -> Result<()> {
        if [self.seq, self.head, self.row].iter().any(|s| !s.is_multiple_of(8)) {
            return invalid(arg, format!("strides {self:?} are not multiples of 8 elements"));
        }
        within(arg, memory, self.elements(shape).saturating_mul(dtype.bytes()), 16)
    }

    /// Elements up to the end of the last row of `[seqs, heads, rows, dim]`; all there can be if that is too many to count.
    pub(crate) fn elements(&self, shape: [usize; 4]) -> usize {
        if shape.contains(&0) {
            return 0;
        }
        let [seq, head, row] = [(0, self.seq), (1, self.head), (2, self.row)].map(|(i, s)| (shape[i] - 1).saturating_mul(s));
        seq.saturating_add(head).saturating_add(row).saturating_add(shape[3])
    }
}
