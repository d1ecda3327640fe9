//! attend_quantized.

mod device;

pub use device::Side;

use super::attend::{Common, reference_dtype};
use super::case::{Case, Output, expect};
use super::formats::{Stored, group};
use super::{Result, input};
use crate::backend::Backend;
use kvlar_reference::{AttendInput, Codec, QuantizedInput, Tiers};

/// Rows of queries that one launch takes.
const MAX_QUERY_ROWS: usize = 8;

#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    hq: usize,
    hk: usize,
    s: usize,
    t: usize,
    d: usize,
    dv: usize,
}

/// Everything that attention over encoded rows reads, rounded and checked.
#[derive(Clone)]
struct Inputs {
    dims: Dims,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    common: Common,
    keys: Stored,
    values: Stored,
    sink_rows: usize,
    recent_rows: usize,
    int8_query: bool,
}

/// Tensors of the result, as `OPS.md` names them.
struct Outputs {
    out: Vec<f32>,
    lse: Vec<f32>,
    k_decoded: Vec<f32>,
    v_decoded: Vec<f32>,
}

impl Inputs {
    fn read(case: &mut Case) -> Result<Self> {
        let (q, k, v) = (case.floats("q", 4)?, case.floats("k", 4)?, case.floats("v", 4)?);
        let [b, hq, s, d] = q.shape[..] else { return input("q") };
        let (hk, t, dv) = (k.shape[1], k.shape[2], v.shape[3]);
        expect("k", &k.shape, &[b, hk, t, d])?;
        expect("v", &v.shape, &[b, hk, t, dv])?;
        if hk == 0 || !hq.is_multiple_of(hk) || d == 0 || dv == 0 {
            return input(format!("q has {hq} heads of {d} dimensions, k {hk} heads, v {dv} dimensions"));
        }
        if s > MAX_QUERY_ROWS {
            return input(format!("q has {s} query rows; up to {MAX_QUERY_ROWS} are possible"));
        }
        let common = Common::read(case, (b, hq, hk, s, t, d))?;
        let group = group(case)?;
        let keys = Stored::read(case, "key_codec", None, group, d)?.with_scales(case, "k_scale", hk)?;
        let keys = keys.with_codebooks(case, Some(hk), d)?;
        let values = Stored::read(case, "value_codec", None, group, dv)?.with_scales(case, "v_scale", hk)?;
        if values.format.codec == Codec::Pq {
            return input(format!("value_codec: {} is for keys: there are no codebooks of values", values.format));
        }
        let (sink_rows, recent_rows) = (case.scalar("sink_rows", 0)?, case.scalar("recent_rows", 0)?);
        let int8_query = case.choice("query", &[("dtype", false), ("int8", true)])?;
        case.finish()?;
        let round = |x: Vec<f32>| reference_dtype(common.dtype).round_all(&x);
        Ok(Self {
            dims: Dims { b, hq, hk, s, t, d, dv },
            q: round(q.values),
            k: round(k.values),
            v: round(v.values),
            common,
            keys,
            values,
            sink_rows,
            recent_rows,
            int8_query,
        })
    }

    fn reference(&self) -> Result<Outputs> {
        let Dims { b, hq, hk, s, t, d, dv } = self.dims;
        let r = kvlar_reference::attend_quantized(&QuantizedInput {
            attend: AttendInput {
                seqs: b,
                q_heads: hq,
                kv_heads: hk,
                query_rows: s,
                rows: t,
                head_dim: d,
                value_dim: dv,
                q: &self.q,
                k: &self.k,
                v: &self.v,
                lengths: self.common.lengths.as_deref(),
                positions: self.common.positions.as_deref(),
                q_positions: self.common.q_positions.as_deref(),
                sink_logits: self.common.sink_logits.as_deref(),
                scale: Some(self.common.scale),
                softcap: self.common.softcap,
                window: i64::from(self.common.window),
            },
            keys: self.keys.storage(),
            values: self.values.storage(),
            tiers: Tiers { dtype: reference_dtype(self.common.dtype), sink_rows: self.sink_rows, recent_rows: self.recent_rows },
            int8_query: self.int8_query,
        })?;
        Ok(Outputs { out: r.out, lse: r.lse, k_decoded: r.k_decoded, v_decoded: r.v_decoded })
    }
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let Dims { b, hq, hk, s, t, d, dv } = i.dims;
    let r = if backend == Backend::Reference { i.reference()? } else { device::run(&i, backend)? };
    Ok(Output::default()
        .floats("out", &[b, hq, s, dv], &r.out)
        .floats("lse", &[b, hq, s], &r.lse)
        .floats("k_decoded", &[b, hk, t, d], &r.k_decoded)
        .floats("v_decoded", &[b, hk, t, dv], &r.v_decoded))
}
