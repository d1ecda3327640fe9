//! scan.

use super::attend_quantized::Side;
use super::case::{Case, Output, expect, finite};
use super::formats::{Stored, group};
use super::lab::{Lab, reference_dtype};
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Buffer, Codec, Dtype, EncodeShape, Rows, ScanArgs, ScanShape, Workspace};
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

/// Encodes the keys, decodes them for the report, and scans. Channel-wise, what is left after the whole groups is scanned as
/// it is.
fn on_device(i: &Inputs, backend: Backend) -> Result<Scanned> {
    let [b, hq, hk, t, d] = i.dims;
    let (format, lab) = (i.keys.launched()?, Lab::open(backend, i.dtype)?);
    let tables = i.keys.upload_tables(&lab)?;
    let length = |head: usize| match &i.lengths {
        None => t,
        Some(l) => l[if l.len() == b && hk != 1 { head / hk } else { head }] as usize,
    };
    let group = if format.codec.is_channel_wise() { format.group_of(d) } else { 1 };
    let whole = |head: usize| length(head) / group * group;
    let body = Part { lab: &lab, i, first: &|_| 0, len: &whole };
    let mut all = body.scan(Side { format, dim: d, tables: tables.as_ref() })?;
    if group > 1 {
        let native = if i.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
        let rest = Part { lab: &lab, i, first: &whole, len: &|head| length(head) - whole(head) };
        let rest = rest.scan(Side { format: native.into(), dim: d, tables: None })?;
        for head in 0..b * hq {
            let kv = head / hq * hk + head % hq / (hq / hk);
            let (first, len) = (whole(kv), length(kv) - whole(kv));
            all.logits[head * t + first..][..len].copy_from_slice(&rest.logits[head * t..][..len]);
            let top = all.lse[head].max(rest.lse[head]);
            let sum: f32 = [all.lse[head], rest.lse[head]].iter().map(|x| (x - top).exp()).sum();
            all.lse[head] = if top == f32::NEG_INFINITY { top } else { top + sum.ln() };
        }
        for head in 0..b * hk {
            let (first, len) = (whole(head), length(head) - whole(head));
            all.k_decoded[(head * t + first) * d..][..len * d].copy_from_slice(&rest.k_decoded[head * t * d..][..len * d]);
        }
    }
    Ok(all)
}

/// `len` rows of each (sequence, kv head) from row `first` on.
struct Part<'a> {
    lab: &'a Lab,
    i: &'a Inputs,
    first: &'a dyn Fn(usize) -> usize,
    len: &'a dyn Fn(usize) -> usize,
}

impl Part<'_> {
    /// Logits, lse and decoded keys of the part's rows, at the start of each head.
    fn scan(&self, side: Side<'_>) -> Result<Scanned> {
        let (i, lab, [b, hq, hk, t, d]) = (self.i, self.lab, self.i.dims);
        let rows = side.capacity(t);
        let shape = ScanShape {
            scale: i.scale as f32,
            scores: None,
            logits: true,
            ..ScanShape::new(i.dtype, b, (hq, hk), d, side.format, rows)
        };
        let plan = shape.plan(&lab.device)?;
        let encode = EncodeShape { format: side.format, dtype: Dtype::F32, seqs: b, heads: hk, rows, dim: d };
        let encode = encode.plan(&lab.device)?;
        if b * hq == 0 {
            return Ok(Scanned { logits: Vec::new(), lse: Vec::new(), k_decoded: vec![0.0; b * hk * t * d] });
        }
        let lengths = lab.upload(&(0..b * hk).map(|h| (self.len)(h) as i32).collect::<Vec<_>>())?;
        let held = Rows { length_seq_stride: hk, length_head_stride: 1, ..Rows::contiguous(Some(lengths.view()), rows) };
        let tables = side.tables.map(Buffer::view);
        // Rows are encoded in f32, already rounded to the type of q.
        let mut k = vec![0f32; b * hk * rows * d];
        for (head, to) in k.chunks_mut(rows * d).enumerate() {
            let from = &i.k[(head * t + (self.first)(head)) * d..][..(self.len)(head) * d];
            to[..from.len()].copy_from_slice(from);
        }
        let k = lab.upload(&k)?;
        let mut stored = lab.device.alloc(b * side.bytes(hk, t))?;
        let (mut decoded, mut logits) = (lab.device.alloc(4 * b * hk * rows * d)?, lab.device.alloc(4 * b * hq * rows)?);
        let mut lse = lab.device.alloc(4 * b * hq)?;
        encode.encode(&lab.stream, k.view(), &held, &side.pool(stored.view_mut(), hk, t), tables)?;
        let keys = side.pool(stored.view(), hk, t);
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
        // Rows that only make groups whole are left out.
        let held_rows = |x: Vec<f32>, width: usize| -> Vec<f32> {
            x.chunks(rows * width).flat_map(|head| &head[..t * width]).copied().collect()
        };
        Ok(Scanned {
            logits: held_rows(lab.download(&logits)?, 1),
            lse: lab.download(&lse)?,
            k_decoded: held_rows(lab.download(&decoded)?, d),
        })
    }
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
