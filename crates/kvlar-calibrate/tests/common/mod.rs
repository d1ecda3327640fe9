//! Data with known structure, and plain arithmetic to check against.
#![allow(dead_code)] // each test file uses some of it

use kvlar_calibrate::faer::{Mat, MatRef};
use kvlar_calibrate::{LayerShape, ModelShape, PairLayout, RopePairs};
use kvlar_reference::testing::Rng;

/// Rows [n, heads·dim] of `rank` hidden factors mixed at random, plus noise; spectrum falls off.
pub fn mixed(rng: &mut Rng, n: usize, width: usize, rank: usize, noise: f32) -> Vec<f32> {
    let mix = rng.normals(rank * width, 1.0);
    let mut rows = Vec::with_capacity(n * width);
    for _ in 0..n {
        let z: Vec<f32> = (0..rank).map(|j| rng.normal() / (1.0 + j as f32)).collect();
        rows.extend((0..width).map(|c| (0..rank).map(|j| z[j] * mix[j * width + c]).sum::<f32>() + noise * rng.normal()));
    }
    rows
}

/// A row-major f32 matrix in f64.
pub fn mat(values: &[f32], rows: usize, cols: usize) -> Mat<f64> {
    assert_eq!(values.len(), rows * cols);
    Mat::from_fn(rows, cols, |r, c| f64::from(values[r * cols + c]))
}

/// Σ of squares.
pub fn norm2(m: MatRef<'_, f64>) -> f64 {
    (0..m.nrows()).flat_map(|r| (0..m.ncols()).map(move |c| (r, c))).map(|at| m[at] * m[at]).sum()
}

/// Columns of some heads of rows [n, heads·dim].
pub fn columns(rows: &Mat<f64>, heads: &[usize], dim: usize) -> Mat<f64> {
    Mat::from_fn(rows.nrows(), heads.len() * dim, |r, c| rows[(r, heads[c / dim] * dim + c % dim)])
}

#[track_caller]
pub fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance * (1.0 + a.abs().max(b.abs())), "{a} and {b} differ");
}

#[track_caller]
pub fn near(a: MatRef<'_, f64>, b: MatRef<'_, f64>, tolerance: f64) {
    let apart = norm2((a - b).as_ref()).sqrt();
    let scale = norm2(a).max(norm2(b)).sqrt();
    assert!(apart <= tolerance * (1e-300 + scale), "{apart} apart at scale {scale}");
}

/// Says whether the text of an error names something.
#[track_caller]
pub fn says<T>(result: kvlar_calibrate::Result<T>, words: &[&str]) {
    let text = match result {
        Ok(_) => panic!("no error; it should say {words:?}"),
        Err(e) => e.to_string(),
    };
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

pub fn model(layers: usize, q_heads: usize, kv_heads: usize, dim: usize, value_dim: usize) -> ModelShape {
    ModelShape {
        layers,
        layer: LayerShape { q_heads, kv_heads, head_dim: dim, value_dim },
        hidden: 48,
        rope: RopePairs { rotary_dim: dim / 2 * 2, layout: PairLayout::Half },
    }
}

/// An orthogonal matrix from random numbers.
pub fn rotation(rng: &mut Rng, n: usize) -> Mat<f64> {
    mat(&rng.normals(n * n, 1.0), n, n).qr().compute_thin_Q()
}
