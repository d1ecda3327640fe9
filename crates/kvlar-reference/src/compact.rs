//! Kept rows moved together.

use crate::error::{ReferenceError, shape, value};

/// Where kept rows go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompactOrder {
    /// They stay in order.
    #[default]
    Keep,
    /// Those among the first n stay where they are; each hole, ascending, takes the last kept row that is behind it.
    Any,
}

/// Inputs of [`compact`]; names as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct CompactInput<'a> {
    /// H.
    pub heads: usize,
    /// T.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// dv.
    pub value_dim: usize,
    /// `[H, T, d]`.
    pub k: &'a [f32],
    /// `[H, T, dv]`.
    pub v: &'a [f32],
    /// `[H, T]`: 1 keeps a row, 0 drops it.
    pub keep: &'a [u8],
    /// `[T]`.
    pub positions: &'a [i32],
    /// Where they go.
    pub order: CompactOrder,
}

/// What is left, head after head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compacted {
    /// `[Σn, d]`.
    pub k: Vec<f32>,
    /// `[Σn, dv]`.
    pub v: Vec<f32>,
    /// `[H]`: rows n of each head.
    pub lengths: Vec<i32>,
    /// `[Σn]`: positions of the rows, which do not change as rows move.
    pub positions: Vec<i32>,
    /// `[Σn]`: where each row was in its head.
    pub source: Vec<i32>,
}

/// Each head's kept rows, bit for bit, without the others.
///
/// # Errors
/// A tensor of the wrong size, a `keep` that is neither 0 nor 1.
pub fn compact(i: &CompactInput<'_>) -> Result<Compacted, ReferenceError> {
    shape("k", i.k.len(), &[i.heads, i.rows, i.head_dim])?;
    shape("v", i.v.len(), &[i.heads, i.rows, i.value_dim])?;
    shape("keep", i.keep.len(), &[i.heads, i.rows])?;
    shape("positions", i.positions.len(), &[i.rows])?;
    if i.rows > i32::MAX as usize {
        return value("k", format!("{} rows are more than i32 can number", i.rows));
    }
    if let Some(bad) = i.keep.iter().find(|&&x| x > 1) {
        return value("keep", format!("{bad} is neither 0 nor 1"));
    }
    let mut out = Compacted::default();
    for head in 0..i.heads {
        let source = row_sources(&i.keep[head * i.rows..][..i.rows], i.order);
        out.lengths.push(source.len() as i32);
        for &row in &source {
            let at = head * i.rows + row;
            out.k.extend(&i.k[at * i.head_dim..][..i.head_dim]);
            out.v.extend(&i.v[at * i.value_dim..][..i.value_dim]);
            out.positions.push(i.positions[row]);
            out.source.push(row as i32);
        }
    }
    Ok(out)
}

/// Which row comes to each place of a head; `keep` is 1 for the rows that are kept.
pub fn row_sources(keep: &[u8], order: CompactOrder) -> Vec<usize> {
    let kept: Vec<usize> = (0..keep.len()).filter(|&row| keep[row] == 1).collect();
    if order == CompactOrder::Keep {
        return kept;
    }
    // As many kept rows are behind the first n as there are holes among them.
    let mut tail = kept.iter().copied().rev();
    (0..kept.len()).filter_map(|place| if keep[place] == 1 { Some(place) } else { tail.next() }).collect()
}
