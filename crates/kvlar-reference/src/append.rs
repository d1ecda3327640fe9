//! Writing rows into a cache.

use crate::error::{ReferenceError, shape, value};
use crate::{Rope, Storage};

/// Inputs of [`append`]; names as in `OPS.md`.
#[derive(Clone, Debug)]
pub struct AppendInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// S.
    pub new_rows: usize,
    /// d.
    pub head_dim: usize,
    /// dv.
    pub value_dim: usize,
    /// `[B, Hk, S, d]`, before RoPE.
    pub k: &'a [f32],
    /// `[B, Hk, S, dv]`.
    pub v: &'a [f32],
    /// `[B, S]`.
    pub positions: &'a [i32],
    /// `[B, S]`: the row that each goes to, below S; negative = skip. Of two rows for one slot the later stays.
    pub slots: &'a [i32],
    /// How keys are rotated.
    pub rope: &'a Rope,
    /// How keys are stored: any codec whose rows are encoded alone.
    pub keys: Storage<'a>,
    /// Likewise.
    pub values: Storage<'a>,
}

/// What a later read of each slot gives; 0 where nothing was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Appended {
    /// `[B, Hk, S, d]`.
    pub k_decoded: Vec<f32>,
    /// `[B, Hk, S, dv]`.
    pub v_decoded: Vec<f32>,
}

/// Rotates and encodes keys, encodes values, and decodes them again at their slots.
///
/// # Errors
/// A tensor of the wrong size, a slot of S or more, a group that does not divide, a channel-wise codec (its rows are encoded a
/// group at a time).
pub fn append(input: &AppendInput<'_>) -> Result<Appended, ReferenceError> {
    let (b, h, s, d, dv) = (input.seqs, input.kv_heads, input.new_rows, input.head_dim, input.value_dim);
    shape("k", input.k.len(), &[b, h, s, d])?;
    shape("v", input.v.len(), &[b, h, s, dv])?;
    shape("positions", input.positions.len(), &[b, s])?;
    shape("slots", input.slots.len(), &[b, s])?;
    if let Some(slot) = input.slots.iter().find(|&&x| x >= s as i32) {
        return value("slots", format!("{slot} is not below {s}"));
    }
    input.rope.check(d)?;
    for (name, storage) in [("k", &input.keys), ("v", &input.values)] {
        if storage.format.codec.is_channel_wise() {
            let format = storage.format;
            return value(
                name,
                format!("{format} rows are encoded a group at a time, not as they come; take a token-wise codec"),
            );
        }
    }
    let keys = input.keys.heads(h, d)?;
    let values = input.values.heads(h, dv)?;
    let mut out = Appended { k_decoded: vec![0.0; b * h * s * d], v_decoded: vec![0.0; b * h * s * dv] };
    for (seq, head, row) in (0..b).flat_map(|b| (0..h).flat_map(move |h| (0..s).map(move |s| (b, h, s)))) {
        let Ok(slot) = usize::try_from(input.slots[seq * s + row]) else { continue };
        let (from, to) = ((seq * h + head) * s + row, (seq * h + head) * s + slot);
        let rotated = input.rope.rotate(&input.k[from * d..][..d], i64::from(input.positions[seq * s + row]));
        out.k_decoded[to * d..][..d].copy_from_slice(&keys[head].row(&rotated)?);
        out.v_decoded[to * dv..][..dv].copy_from_slice(&values[head].row(&input.v[from * dv..][..dv])?);
    }
    Ok(out)
}
