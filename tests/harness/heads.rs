//! What dense and low-rank attention share: rows as plain attention has them, the reference's result over them, and the
//! comparison with it.

use crate::reference_dtype;
use kvlar::{Dtype, Status};
use kvlar_reference::compare;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Attended};
use std::fmt::Debug;

/// All rows of a (sequence, kv head), segment after segment.
#[derive(Clone, Debug, Default)]
pub struct HeadRows {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub positions: Vec<i32>,
}

fn padded<T: Clone>(x: &[T], len: usize, with: T) -> Vec<T> {
    let mut x = x.to_vec();
    x.resize(len, with);
    x
}

/// By the reference, over the rows of each (sequence, kv head); `input` says everything else. Behind a head's rows there is
/// NaN, of which nothing may come.
pub fn attend(input: AttendInput<'_>, rows: impl Fn(usize, usize) -> HeadRows) -> Attended {
    let all = (0..input.seqs).flat_map(|b| (0..input.kv_heads).map(move |h| (b, h)));
    let heads: Vec<_> = all.map(|(b, h)| rows(b, h)).collect();
    let t = heads.iter().map(|h| h.positions.len()).max().unwrap_or(0);
    let k: Vec<f32> = heads.iter().flat_map(|h| padded(&h.keys, t * input.head_dim, f32::NAN)).collect();
    let v: Vec<f32> = heads.iter().flat_map(|h| padded(&h.values, t * input.value_dim, f32::NAN)).collect();
    let positions: Vec<i32> = heads.iter().flat_map(|h| padded(&h.positions, t, 0)).collect();
    let lengths: Vec<i32> = heads.iter().map(|h| h.positions.len() as i32).collect();
    let dense = AttendInput { rows: t, k: &k, v: &v, lengths: Some(&lengths), positions: Some(&positions), ..input };
    kvlar_reference::attend(&dense).expect("a valid case")
}

/// The bound of an output that is rounded to a type.
pub fn rounded_to(dtype: Dtype, mut tolerance: Tolerance) -> Tolerance {
    if dtype != Dtype::F32 {
        let u = reference_dtype(dtype).unit_roundoff();
        tolerance.relative += u;
        tolerance.absolute += u;
        tolerance.cosine += u * u;
    }
    tolerance
}

/// Compares results, with bounds for the output and for lse; the text names the case.
pub fn compare_attended(
    actual: &Attended,
    expected: &Attended,
    (out, lse): (Tolerance, Tolerance),
    case: &impl Debug,
) -> Result<(), String> {
    compare::compare(&actual.lse, &expected.lse, lse).map_err(|e| format!("lse: {e}\n{case:?}"))?;
    compare::compare(&actual.out, &expected.out, out).map_err(|e| format!("out: {e}\n{case:?}"))
}

/// As [`compare_attended`], and kernels must not have had to clamp anything.
pub fn check_attended(
    actual: &Attended,
    status: Status,
    expected: &Attended,
    bounds: (Tolerance, Tolerance),
    case: &impl Debug,
) -> Result<(), String> {
    compare_attended(actual, expected, bounds, case)?;
    if status.is_clean() { Ok(()) } else { Err(format!("{status:?}\n{case:?}")) }
}
