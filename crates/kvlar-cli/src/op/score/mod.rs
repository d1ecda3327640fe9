//! score_window, score_column, score_gate, score_keys, score_repeat.

mod column;
mod device;
mod gate;
mod keys;
mod repeat;
mod window;

pub use column::run as column;
pub use gate::run as gate;
pub use keys::run as keys;
pub use repeat::run as repeat;
pub use window::run as window;

use super::case::{Case, finite};
use super::lab::reference_dtype;
use super::{Result, input};
use kvlar::Dtype;

/// Queries and keys of all heads, rounded.
struct Heads {
    /// B.
    seqs: usize,
    /// Hq.
    q_heads: usize,
    /// Hk.
    kv_heads: usize,
    /// Query rows.
    queries: usize,
    /// T.
    rows: usize,
    /// d.
    head_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    scale: f64,
    dtype: Dtype,
}

impl Heads {
    /// `q [B, Hq, S, d]`, `k [B, Hk, T, d]`, `dtype` and `scale`.
    fn read(case: &mut Case) -> Result<Self> {
        let (q, k) = (case.floats("q", 4)?, case.floats("k", 4)?);
        let ([b, hq, s, d], [_, hk, t, _]) = (sizes(&q.shape), sizes(&k.shape));
        if k.shape != [b, hk, t, d] {
            return input(format!("q is {:?} and k {:?}: they must agree in sequences and dimensions", q.shape, k.shape));
        }
        divides(hq, hk, d)?;
        let dtype = case.dtype()?;
        let (scale, round) = (scale(case, d)?, |x: &[f32]| reference_dtype(dtype).round_all(x));
        let (q, k) = (round(&q.values), round(&k.values));
        Ok(Self { seqs: b, q_heads: hq, kv_heads: hk, queries: s, rows: t, head_dim: d, q, k, scale, dtype })
    }
}

/// The sizes of a tensor whose rank was checked.
fn sizes<const N: usize>(shape: &[usize]) -> [usize; N] {
    std::array::from_fn(|i| shape[i])
}

fn divides(q_heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
    if kv_heads == 0 || q_heads == 0 || !q_heads.is_multiple_of(kv_heads) || head_dim == 0 {
        return input(format!("q has {q_heads} heads of {head_dim} dimensions, k {kv_heads} heads"));
    }
    Ok(())
}

fn scale(case: &mut Case, head_dim: usize) -> Result<f64> {
    finite("scale", case.scalar("scale", 1.0 / (head_dim as f64).sqrt())?)
}
