//! score_keys.

use super::sizes;
use crate::backend::Backend;
use crate::op::case::{Case, Output, expect};
use crate::op::lab::{Lab, reference_dtype};
use crate::op::{Result, input};
use kvlar::{Dtype, KeySums, Pool, Rows, ScoreKeysArgs, ScoreKeysShape, Workspace};
use kvlar_reference::{KeyMethod, KeysInput, score_keys};

/// Rows next to each other.
fn on_device(i: &KeysInput<'_>, dtype: Dtype, backend: Backend) -> Result<Vec<f32>> {
    let lab = Lab::open(backend, dtype)?;
    let KeysInput { method, seqs, kv_heads, rows: max_rows, head_dim, value_dim, .. } = *i;
    let shape = ScoreKeysShape { dtype, method, seqs, kv_heads, max_rows, head_dim, value_dim, fill: false };
    let plan = shape.plan(&lab.device)?;
    if seqs * kv_heads * max_rows == 0 {
        return Ok(Vec::new());
    }
    let (keys, values) = (lab.upload_as(i.k, dtype)?, lab.upload_as(i.v.unwrap_or_default(), dtype)?);
    let mut scores = lab.device.alloc(4 * seqs * kv_heads * max_rows)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let pool = |view, dim: usize| Pool::contiguous(view, kv_heads, max_rows, dim * dtype.bytes());
    let mut args = ScoreKeysArgs {
        rows: Rows::contiguous(None, max_rows),
        keys: pool(keys.view(), head_dim),
        values: method.needs_values().then(|| pool(values.view(), value_dim)),
        scores: scores.view_mut(),
        score_strides: None,
        sums: KeySums::Own,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    lab.download(&scores)
}

const METHODS: [(&str, KeyMethod); 4] = [
    ("l2norm", KeyMethod::L2Norm),
    ("keydiff", KeyMethod::KeyDiff),
    ("lagkv", KeyMethod::LagKv),
    ("value_key_ratio", KeyMethod::ValueKeyRatio),
];

/// It has no default.
fn method(case: &mut Case) -> Result<KeyMethod> {
    let all = METHODS.map(|m| m.0).join(", ");
    let Some(name) = case.text("method") else { return input(format!("no key method; it is one of {all}")) };
    match METHODS.into_iter().find(|m| m.0 == name) {
        Some((_, method)) => Ok(method),
        None => input(format!("method: {name:?} is none of {all}")),
    }
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let k = case.floats("k", 4)?;
    let [seqs, kv_heads, rows, head_dim] = sizes(&k.shape);
    let method = method(case)?;
    // A case may hold v for all methods; those that do not need it ignore it.
    let v = if method.needs_values() { Some(case.floats("v", 4)?) } else { case.floats_if_any("v")? };
    let value_dim = v.as_ref().and_then(|v| v.shape.last()).copied().unwrap_or(0);
    if let Some(v) = &v {
        expect("v", &v.shape, &[seqs, kv_heads, rows, value_dim])?;
    }
    let stored = case.dtype()?;
    let dtype = reference_dtype(stored);
    case.finish()?;
    let (k, v) = (dtype.round_all(&k.values), v.map(|v| dtype.round_all(&v.values)));
    let i = KeysInput { seqs, kv_heads, rows, head_dim, value_dim, k: &k, v: v.as_deref(), method };
    i.check()?;
    let scores = match backend {
        Backend::Reference => score_keys(&i)?,
        _ => on_device(&i, stored, backend)?,
    };
    Ok(Output::default().floats("scores", &[seqs, kv_heads, rows], &scores))
}
