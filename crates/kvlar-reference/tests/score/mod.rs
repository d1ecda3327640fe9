//! Scores of cached rows, a file an op.

mod column;
mod gate;
mod keys;
mod repeat;
mod window;

use kvlar_reference::{AttendInput, ReferenceError, attend};

#[track_caller]
fn close(actual: &[f32], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len());
    for (i, (&a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(a) - e).abs() <= 1e-6 * e.abs().max(1.0), "{i}: {a} instead of {e}, of {actual:?}");
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ReferenceError>, words: &str) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(words), "{text:?} does not say {words:?}");
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// Attention weights `[Hq, S, T]` of the last S rows, and lse `[Hq, S]`: what attention gives for values that are one-hot.
fn attention(q: &[f32], k: &[f32], [q_heads, kv_heads, query_rows, rows, head_dim]: [usize; 5]) -> (Vec<f32>, Vec<f32>) {
    let one_hot: Vec<f32> = (0..rows * rows).map(|i| if i / rows == i % rows { 1.0 } else { 0.0 }).collect();
    let v = one_hot.repeat(kv_heads);
    let a = AttendInput {
        seqs: 1,
        q_heads,
        kv_heads,
        query_rows,
        rows,
        head_dim,
        value_dim: rows,
        q,
        k,
        v: &v,
        ..Default::default()
    };
    let r = attend(&a).unwrap();
    (r.out, r.lse)
}
