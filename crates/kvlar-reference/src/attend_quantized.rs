//! Attention over encoded keys and values.

use crate::codec::hadamard;
use crate::error::ReferenceError;
use crate::storage::{Storage, Tiers, quantize_heads};
use crate::{AttendInput, Attended, attend};

/// Inputs of [`attend_quantized`]; names and defaults as in `OPS.md`.
#[derive(Clone, Debug)]
pub struct QuantizedInput<'a> {
    /// Queries, rows and masks; k and v as they come, rounded to `tiers.dtype`.
    pub attend: AttendInput<'a>,
    /// How keys are stored.
    pub keys: Storage<'a>,
    /// How values are stored.
    pub values: Storage<'a>,
    /// Which rows of either are exact.
    pub tiers: Tiers,
    /// Quantize q too, as all rows see it, exact ones not excepted: see [`Int8Query`].
    pub int8_query: bool,
}

/// What attention over encoded rows gives.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedAttended {
    /// `[B, Hq, S, dv]`.
    pub out: Vec<f32>,
    /// `[B, Hq, S]`.
    pub lse: Vec<f32>,
    /// `[B, Hk, T, d]`: keys as they are read; 0 beyond a length.
    pub k_decoded: Vec<f32>,
    /// `[B, Hk, T, dv]`, likewise.
    pub v_decoded: Vec<f32>,
    /// Bytes stored, keys and values of all heads: see [`crate::QuantizedRows::bytes`].
    pub bytes: usize,
}

/// The queries of one (sequence, query head) in 8 bits, symmetric: code = rint(q / scale), scale = max|q| / 127 over all S
/// rows of the head (f32, one division each), so that a score is an exact integer product times scales
/// (SageAttention, arXiv 2410.02367 §4).
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Query {
    /// As many as there are values, −127 to 127.
    pub codes: Vec<i8>,
    /// 0 for queries of zeros (or so small that max|q| / 127 is 0); NaN if a value is not finite, which makes all NaN.
    pub scale: f32,
}

impl Int8Query {
    /// Of the head's values `[S, d]`, turned already where keys are.
    pub fn quantize(q: &[f32]) -> Self {
        if q.iter().any(|x| !x.is_finite()) {
            return Self { codes: vec![0; q.len()], scale: f32::NAN };
        }
        let scale = q.iter().fold(0f32, |top, x| top.max(x.abs())) / 127.0;
        let code = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 };
        Self { codes: q.iter().map(code).collect(), scale }
    }

    /// code · scale.
    pub fn dequantize(&self) -> Vec<f32> {
        self.codes.iter().map(|&c| f32::from(c) * self.scale).collect()
    }
}

/// Queries as scores see them, turned back where keys are turned: then (Hq)·(Hk) = q·k lets all rows, exact ones too, be read
/// in the plain space.
fn seen_queries(input: &QuantizedInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    let (d, turned) = (input.attend.head_dim, input.keys.format.hadamard);
    let turn = |rows: &[f32]| -> Result<Vec<f32>, ReferenceError> {
        let mut out = Vec::with_capacity(rows.len());
        for row in rows.chunks_exact(d) {
            out.extend(hadamard(row)?);
        }
        Ok(out)
    };
    let mut all = Vec::with_capacity(input.attend.q.len());
    for head in input.attend.q.chunks_exact((input.attend.query_rows * d).max(1)) {
        if turned {
            all.extend(turn(&Int8Query::quantize(&turn(head)?).dequantize())?);
        } else {
            all.extend(Int8Query::quantize(head).dequantize());
        }
    }
    Ok(all)
}

/// Stores keys and values, reads them again, and attends over what is read, in f64 (HCAttention, arXiv 2507.19823;
/// KIVI, arXiv 2402.02750 §3).
///
/// # Errors
/// As [`attend`]; a format, scales or codebooks that do not fit ([`Storage::heads`]).
pub fn attend_quantized(input: &QuantizedInput<'_>) -> Result<QuantizedAttended, ReferenceError> {
    let a = &input.attend;
    a.check()?;
    let dims = [a.seqs, a.kv_heads, a.rows];
    let keys = quantize_heads(a.k, (dims, a.head_dim), &input.keys, input.tiers, a.lengths)?;
    let values = quantize_heads(a.v, (dims, a.value_dim), &input.values, input.tiers, a.lengths)?;
    let seen = if input.int8_query { Some(seen_queries(input)?) } else { None };
    let q = seen.as_deref().unwrap_or(a.q);
    let Attended { out, lse } = attend(&AttendInput { q, k: &keys.decoded, v: &values.decoded, ..a.clone() })?;
    Ok(QuantizedAttended { out, lse, k_decoded: keys.decoded, v_decoded: values.decoded, bytes: keys.bytes + values.bytes })
}
