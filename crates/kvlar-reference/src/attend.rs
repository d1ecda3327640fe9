//! Attention over cached rows.

use crate::error::{ReferenceError, shape, value};

/// What turns a dot product into a visible logit.
#[derive(Clone, Copy, Debug)]
pub struct Masking {
    /// Multiplies q·k.
    pub scale: f64,
    /// c in c·tanh(x / c), after scaling; 0 = off.
    pub softcap: f64,
    /// A row is visible if q_position − position < window; 0 = off.
    pub window: i64,
}

/// One query row of one head.
#[derive(Clone, Copy, Debug)]
pub struct HeadQuery<'a> {
    /// The rotated query `[d]`.
    pub q: &'a [f32],
    /// Its position: rows beyond it are hidden.
    pub position: i64,
    /// An extra logit in the denominator; softcap does not act on it.
    pub sink: Option<f32>,
}

/// Σ a·b in f64, in eight interleaved sums.
pub(crate) fn dot<T: Copy + Into<f64>>(a: &[f32], b: &[T]) -> f64 {
    let mut sums = [0f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(&x, &y)| f64::from(x) * y.into()).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += f64::from(x[i]) * y[i].into();
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// One query over the rows of its kv head: `out[dv]` and the natural log of Σ exp(logit).
///
/// `keys` is `[n, d]`, `values` `[n, dv]`, `positions` `[n]`. `logits` is scratch. No visible row: 0 and −∞, or the
/// sink's logit.
pub fn attend_row(
    query: HeadQuery<'_>,
    keys: &[f32],
    values: &[f32],
    positions: &[i32],
    masking: Masking,
    logits: &mut Vec<f64>,
    out: &mut [f64],
) -> f64 {
    let (d, dv) = (query.q.len(), out.len());
    let mut top = query.sink.map_or(f64::NEG_INFINITY, f64::from);
    logits.clear();
    logits.extend(keys.chunks_exact(d).zip(positions).map(|(key, &position)| {
        let position = i64::from(position);
        let hidden = position > query.position || (masking.window > 0 && query.position - position >= masking.window);
        if hidden {
            return f64::NEG_INFINITY;
        }
        let x = masking.scale * dot(query.q, key);
        let x = if masking.softcap > 0.0 { masking.softcap * (x / masking.softcap).tanh() } else { x };
        // A NaN logit makes the whole row NaN, as it does in floating-point softmax.
        top = if x.is_nan() || top.is_nan() { f64::NAN } else { top.max(x) };
        x
    }));
    out.fill(0.0);
    if top == f64::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let mut sum = query.sink.map_or(0.0, |s| (f64::from(s) - top).exp());
    for (x, value) in logits.iter().zip(values.chunks_exact(dv)) {
        if *x == f64::NEG_INFINITY {
            continue;
        }
        let weight = (x - top).exp();
        sum += weight;
        for (o, &v) in out.iter_mut().zip(value) {
            *o += weight * f64::from(v);
        }
    }
    out.iter_mut().for_each(|o| *o /= sum);
    top + sum.ln()
}

/// Inputs of [`attend`]; names and defaults as in `OPS.md`.
#[derive(Clone, Debug, Default)]
pub struct AttendInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// S.
    pub query_rows: usize,
    /// T.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// dv.
    pub value_dim: usize,
    /// `[B, Hq, S, d]`, rotated.
    pub q: &'a [f32],
    /// `[B, Hk, T, d]`, rotated.
    pub k: &'a [f32],
    /// `[B, Hk, T, dv]`.
    pub v: &'a [f32],
    /// `[B]` or `[B, Hk]`; default T.
    pub lengths: Option<&'a [i32]>,
    /// `[T]`, `[B, T]` or `[B, Hk, T]`; default the row index.
    pub positions: Option<&'a [i32]>,
    /// `[B, S]`; default the position of row length − S + s.
    pub q_positions: Option<&'a [i32]>,
    /// `[Hq]`.
    pub sink_logits: Option<&'a [f32]>,
    /// Default 1 / √d.
    pub scale: Option<f64>,
    /// 0 = off.
    pub softcap: f64,
    /// 0 = off.
    pub window: i64,
}

/// What attention gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Attended {
    /// `[B, Hq, S, dv]`.
    pub out: Vec<f32>,
    /// `[B, Hq, S]`.
    pub lse: Vec<f32>,
}

/// Lengths `[B]` or `[B, Hk]` of at most T, for dims `[B, Hk, T]`.
pub(crate) fn check_lengths(lengths: Option<&[i32]>, [b, hk, t]: [usize; 3]) -> Result<(), ReferenceError> {
    let Some(x) = lengths else { return Ok(()) };
    if x.len() != b {
        shape("lengths", x.len(), &[b, hk])?;
    }
    match x.iter().find(|&&n| n < 0 || n as usize > t) {
        Some(bad) => value("lengths", format!("{bad} is outside 0..={t}")),
        None => Ok(()),
    }
}

/// Rows of one head, of checked lengths.
pub(crate) fn length_of(lengths: Option<&[i32]>, [seqs, kv_heads, rows]: [usize; 3], b: usize, h: usize) -> usize {
    lengths.map_or(rows, |x| if x.len() == seqs { x[b] as usize } else { x[b * kv_heads + h] as usize })
}

impl AttendInput<'_> {
    pub(crate) fn check(&self) -> Result<(), ReferenceError> {
        let (b, hk, t) = (self.seqs, self.kv_heads, self.rows);
        if hk == 0 || !self.q_heads.is_multiple_of(hk) {
            return value("q", format!("{} query heads are not a multiple of {hk} kv heads", self.q_heads));
        }
        shape("q", self.q.len(), &[b, self.q_heads, self.query_rows, self.head_dim])?;
        shape("k", self.k.len(), &[b, hk, t, self.head_dim])?;
        shape("v", self.v.len(), &[b, hk, t, self.value_dim])?;
        if let Some(x) = self.q_positions {
            shape("q_positions", x.len(), &[b, self.query_rows])?;
        }
        if let Some(x) = self.sink_logits {
            shape("sink_logits", x.len(), &[self.q_heads])?;
        }
        if let Some(x) = self.positions.filter(|x| ![t, b * t, b * hk * t].contains(&x.len())) {
            shape("positions", x.len(), &[b, t])?;
        }
        check_lengths(self.lengths, [b, hk, t])?;
        if !(self.softcap >= 0.0 && self.softcap.is_finite()) {
            return value("softcap", format!("{} is not a finite number of at least 0", self.softcap));
        }
        if self.window < 0 {
            return value("window", format!("{} is negative", self.window));
        }
        Ok(())
    }

    fn length(&self, b: usize, h: usize) -> usize {
        length_of(self.lengths, [self.seqs, self.kv_heads, self.rows], b, h)
    }

    fn position(&self, b: usize, h: usize, row: i64) -> i64 {
        let t = self.rows;
        let Some(x) = self.positions.filter(|_| row >= 0) else { return row };
        let start = match x.len() {
            n if n == t => 0,
            n if n == self.seqs * t => b * t,
            _ => (b * self.kv_heads + h) * t,
        };
        i64::from(x[start + row as usize])
    }
}

/// out = softmax(scale · q kᵀ, masked) v and its log-sum-exp, in f64.
///
/// # Errors
/// A tensor of the wrong size, heads that do not divide, a length outside 0..=T, a bad softcap or window.
pub fn attend(input: &AttendInput<'_>) -> Result<Attended, ReferenceError> {
    input.check()?;
    let (d, dv, t, s_count) = (input.head_dim, input.value_dim, input.rows, input.query_rows);
    let group = input.q_heads / input.kv_heads;
    let masking = Masking { scale: input.scale.unwrap_or(1.0 / (d as f64).sqrt()), softcap: input.softcap, window: input.window };
    let mut result = Attended { out: Vec::new(), lse: Vec::new() };
    let (mut logits, mut out) = (Vec::new(), vec![0f64; dv]);
    for b in 0..input.seqs {
        for head in 0..input.q_heads {
            let h = head / group;
            let (n, start) = (input.length(b, h), (b * input.kv_heads + h) * t);
            let keys = &input.k[start * d..(start + n) * d];
            let values = &input.v[start * dv..(start + n) * dv];
            let positions: Vec<i32> = (0..n).map(|r| input.position(b, h, r as i64) as i32).collect();
            for s in 0..s_count {
                let at = (b * input.q_heads + head) * s_count + s;
                let position = match input.q_positions {
                    Some(x) => i64::from(x[b * s_count + s]),
                    None => input.position(b, h, n as i64 - s_count as i64 + s as i64),
                };
                let query = HeadQuery { q: &input.q[at * d..(at + 1) * d], position, sink: input.sink_logits.map(|x| x[head]) };
                let lse = attend_row(query, keys, values, &positions, masking, &mut logits, &mut out);
                result.out.extend(out.iter().map(|&x| x as f32));
                result.lse.push(lse as f32);
            }
        }
    }
    Ok(result)
}
