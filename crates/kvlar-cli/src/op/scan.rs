//! scan.

use super::attend::{Lab, reference_dtype};
use super::attend_quantized::Side;
use super::case::{Case, Output, expect, finite};
use super::formats::{Stored, group};
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Buffer, Dtype, EncodeShape, Rows, ScanArgs, ScanShape, Workspace};
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
    dtype: Dtype,
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
        Ok(Self { dims: [b, hq, hk, t, d], q: round(q.values), k: round(k.values), lengths, keys, scale, dtype })
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

/// Encodes the keys, decodes them for the report, and scans.
fn on_device(i: &Inputs, backend: Backend) -> Result<Scanned> {
    let [b, hq, hk, t, d] = i.dims;
    let (format, rows) = (i.keys.launched()?, t.max(1));
    let lab = Lab::open(backend, i.dtype)?;
    let shape =
        ScanShape { scale: i.scale as f32, scores: None, logits: true, ..ScanShape::new(i.dtype, b, (hq, hk), d, format, rows) };
    let plan = shape.plan(&lab.device)?;
    let encode = EncodeShape { format, dtype: Dtype::F32, seqs: b, heads: hk, rows, dim: d }.plan(&lab.device)?;
    if b * hq == 0 {
        return Ok(Scanned { logits: Vec::new(), lse: Vec::new(), k_decoded: vec![0.0; b * hk * t * d] });
    }
    let lengths = lab.upload(i.lengths.as_deref().unwrap_or(&vec![t as i32; b]))?;
    let per_head = i.lengths.as_ref().is_some_and(|l| l.len() != b || hk == 1);
    let held = Rows {
        length_seq_stride: if per_head { hk } else { 1 },
        length_head_stride: per_head.into(),
        ..Rows::contiguous(Some(lengths.view()), rows)
    };
    let tables = i.keys.upload_tables(&lab)?;
    let tables = tables.as_ref().map(Buffer::view);
    // Rows are encoded in f32, already rounded to the type of q.
    let mut k = i.k.clone();
    k.resize(b * hk * rows * d, 0.0);
    let k = lab.upload(&k)?;
    let side = Side { format, dim: d, tables: None };
    let mut stored = lab.device.alloc(b * side.bytes(hk, rows))?;
    let (mut decoded, mut logits) = (lab.device.alloc(4 * b * hk * rows * d)?, lab.device.alloc(4 * b * hq * rows)?);
    let mut lse = lab.device.alloc(4 * b * hq)?;
    encode.encode(&lab.stream, k.view(), &held, &side.pool(stored.view_mut(), hk, rows), tables)?;
    let keys = side.pool(stored.view(), hk, rows);
    encode.decode(&lab.stream, &held, &keys, tables, &mut decoded.view_mut())?;
    let q = lab.upload_as(&i.q, i.dtype)?;
    let mut work = plan.work_list(&lab.device)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = ScanArgs {
        q: q.view(),
        q_strides: None,
        rows: held,
        keys,
        tables,
        scores: None,
        logits: Some(logits.view_mut()),
        lse: Some(lse.view_mut()),
        histogram: None,
    };
    plan.schedule(&lab.stream, &args, &mut work, &mut workspace)?;
    plan.launch(&lab.stream, &mut args, &work, &mut workspace)?;
    let [mut logits, mut k_decoded] = [lab.download(&logits)?, lab.download(&decoded)?];
    logits.truncate(b * hq * t);
    k_decoded.truncate(b * hk * t * d);
    Ok(Scanned { logits, lse: lab.download(&lse)?, k_decoded })
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
