//! How a result is compared with the reference.

use crate::tolerance::Tolerance;
use std::fmt;

/// Why two tensors differ too much.
#[derive(Clone, Debug, PartialEq)]
pub enum Mismatch {
    /// They have different sizes.
    Length(usize, usize),
    /// NaN, +∞ or −∞ stands in one and not in the other.
    NonFinite {
        /// The first such element.
        index: usize,
        /// Its value.
        actual: f32,
        /// The reference's.
        expected: f32,
        /// How many there are.
        count: usize,
    },
    /// Elements are off by more than both bounds.
    Element {
        /// The worst element.
        index: usize,
        /// Its value.
        actual: f32,
        /// The reference's.
        expected: f32,
        /// How many there are.
        count: usize,
    },
    /// 1 − 2⟨a, e⟩ / (⟨a, a⟩ + ⟨e, e⟩) is above the bound: small errors everywhere, in one direction.
    Cosine(f64),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(a, e) => write!(f, "{a} elements instead of {e}"),
            Self::NonFinite { index, actual, expected, count } => {
                write!(f, "element {index} is {actual}, expected {expected} ({count} non-finite mismatches)")
            }
            Self::Element { index, actual, expected, count } => {
                write!(f, "element {index} is {actual}, expected {expected} (worst of {count})")
            }
            Self::Cosine(d) => write!(f, "cosine distance {d:e}"),
        }
    }
}

/// Three checks: the same elements are non-finite, each element is within the absolute or the relative bound, and the
/// tensors point the same way.
///
/// # Errors
/// The first check that fails.
pub fn compare(actual: &[f32], expected: &[f32], tolerance: Tolerance) -> Result<(), Mismatch> {
    if actual.len() != expected.len() {
        return Err(Mismatch::Length(actual.len(), expected.len()));
    }
    let pairs = || actual.iter().zip(expected).enumerate();
    let kind = |x: f32| {
        if x.is_nan() {
            2
        } else if x.is_infinite() {
            x.signum() as i32
        } else {
            0
        }
    };
    let mut odd = pairs().filter(|(_, (a, e))| kind(**a) != kind(**e));
    if let Some((index, (&actual, &expected))) = odd.next() {
        return Err(Mismatch::NonFinite { index, actual, expected, count: 1 + odd.count() });
    }
    let finite = || pairs().filter(|(_, (_, e))| e.is_finite()).map(|(i, (&a, &e))| (i, a, e));
    let excess = |a: f32, e: f32| {
        let error = (f64::from(a) - f64::from(e)).abs();
        error - tolerance.absolute.max(tolerance.relative * f64::from(e.abs()))
    };
    let bad: Vec<_> = finite().filter(|&(_, a, e)| excess(a, e) > 0.0).collect();
    if let Some(&(index, actual, expected)) = bad.iter().max_by(|x, y| excess(x.1, x.2).total_cmp(&excess(y.1, y.2))) {
        return Err(Mismatch::Element { index, actual, expected, count: bad.len() });
    }
    let sum = |f: fn(f64, f64) -> f64| finite().map(|(_, a, e)| f(a.into(), e.into())).sum::<f64>();
    let norms = sum(|a, e| a * a + e * e);
    let distance = if norms > 0.0 { 1.0 - 2.0 * sum(|a, e| a * e) / norms } else { 0.0 };
    if distance > tolerance.cosine { Err(Mismatch::Cosine(distance)) } else { Ok(()) }
}
