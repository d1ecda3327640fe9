//! attend_quantized.

mod device;

pub use device::Side;

use super::attention::{Attention, Dims};
use super::case::{Case, Output};
use super::formats::{Stored, group};
use super::lab::reference_dtype;
use super::{Result, input};
use crate::backend::Backend;
use kvlar_reference::{Codec, QuantizedInput, Tiers};

/// Rows of queries that one launch takes.
const MAX_QUERY_ROWS: usize = 8;

/// Everything that attention over encoded rows reads, rounded and checked.
#[derive(Clone)]
struct Inputs {
    attention: Attention,
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
        let attention = Attention::read(case)?;
        let Dims { hk, s, d, dv, .. } = attention.dims;
        if s > MAX_QUERY_ROWS {
            return input(format!("q has {s} query rows; up to {MAX_QUERY_ROWS} are possible"));
        }
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
        Ok(Self { attention, keys, values, sink_rows, recent_rows, int8_query })
    }

    fn reference(&self) -> Result<Outputs> {
        let dtype = reference_dtype(self.attention.common.dtype);
        let r = kvlar_reference::attend_quantized(&QuantizedInput {
            attend: self.attention.input(),
            keys: self.keys.storage(),
            values: self.values.storage(),
            tiers: Tiers { dtype, sink_rows: self.sink_rows, recent_rows: self.recent_rows },
            int8_query: self.int8_query,
        })?;
        Ok(Outputs { out: r.out, lse: r.lse, k_decoded: r.k_decoded, v_decoded: r.v_decoded })
    }
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let Dims { b, hq, hk, s, t, d, dv } = i.attention.dims;
    let r = if backend == Backend::Reference { i.reference()? } else { device::run(&i, backend)? };
    Ok(Output::default()
        .floats("out", &[b, hq, s, dv], &r.out)
        .floats("lse", &[b, hq, s], &r.lse)
        .floats("k_decoded", &[b, hk, t, d], &r.k_decoded)
        .floats("v_decoded", &[b, hk, t, dv], &r.v_decoded))
}
