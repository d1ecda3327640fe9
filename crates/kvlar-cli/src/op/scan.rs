//! scan.

use super::attend::reference_dtype;
use super::case::{Case, Output, expect, finite};
use super::formats::{Stored, group};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar_reference::{ScanInput, Scanned};

/// Everything that a scan reads, rounded and checked.
struct Inputs {
    /// B, Hq, Hk, T, d.
    dims: [usize; 5],
    q: Vec<f32>,
    k: Vec<f32>,
    lengths: Option<Vec<i32>>,
    keys: Stored,
    scale: f64,
}

impl Inputs {
    fn read(case: &mut Case) -> Result<Self> {
        let (q, k) = (case.floats("q", 3)?, case.floats("k", 4)?);
        let [b, hq, d] = q.shape[..] else { return input("q") };
        let (hk, t) = (k.shape[1], k.shape[2]);
        expect("k", &k.shape, &[b, hk, t, d])?;
        if hk == 0 || !hq.is_multiple_of(hk) || d == 0 {
            return input(format!("q has {hq} heads of {d} dimensions, k {hk} heads"));
        }
        let lengths = case.ints("lengths", &[&[b], &[b, hk]])?;
        if let Some(bad) = lengths.iter().flatten().find(|&&n| n < 0 || n as usize > t) {
            return input(format!("lengths: {bad} is outside 0..={t}"));
        }
        let dtype = case.dtype()?;
        let scale = finite("scale", case.scalar("scale", 1.0 / (d as f64).sqrt())?)?;
        let group = group(case)?;
        let keys = Stored::read(case, "key_codec", None, group, d)?.with_scales(case, "k_scale", hk)?;
        let keys = keys.with_codebooks(case, Some(hk), d)?;
        case.finish()?;
        let round = |x: Vec<f32>| reference_dtype(dtype).round_all(&x);
        Ok(Self { dims: [b, hq, hk, t, d], q: round(q.values), k: round(k.values), lengths, keys, scale })
    }

    fn reference(&self) -> Result<Scanned> {
        let [b, hq, hk, t, d] = self.dims;
        Ok(kvlar_reference::scan(&ScanInput {
            seqs: b,
            q_heads: hq,
            kv_heads: hk,
            rows: t,
            head_dim: d,
            q: &self.q,
            k: &self.k,
            keys: self.keys.storage(),
            lengths: self.lengths.as_deref(),
            scale: Some(self.scale),
        })?)
    }
}

/// No kernel scans yet.
fn on_device(i: &Inputs, _: Backend) -> Result<Scanned> {
    Err(OpError::Unsupported(format!("scan of {} keys runs on the reference only", i.keys.format)))
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let [b, hq, hk, t, d] = i.dims;
    let r = if backend == Backend::Reference { i.reference()? } else { on_device(&i, backend)? };
    Ok(Output::default().floats("logits", &[b, hq, t], &r.logits).floats("lse", &[b, hq], &r.lse).floats(
        "k_decoded",
        &[b, hk, t, d],
        &r.k_decoded,
    ))
}
