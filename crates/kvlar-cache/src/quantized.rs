//! Layers of a plan whose rows are codes: what kernels call their formats, and what the rows of a head share.

use crate::error::invalid;
use crate::layer::{Layer, native};
use crate::{CacheConfig, Result};
use kvlar::{
    AppendPlan, AppendShape, AttendPlan, AttendShape, Buffer, Codec, Device, Format, SegmentShape, Stream, Tables, WorkList,
    WorkspaceSize,
};
use kvlar_calibrate::{Plan, QuantizedCodec, QuantizedFormat, Side};

/// Formats of a layer's rows, and their codebooks on the device.
#[derive(Debug)]
pub(crate) struct QuantizedLayer {
    /// Of keys and of values.
    pub formats: [Format; 2],
    codebooks: [Option<Buffer>; 2],
}

/// The format of a plan's rows. All that kernels know of a plan's formats is decided here.
fn format(q: QuantizedFormat) -> Result<Format> {
    let codec = match q.codec {
        QuantizedCodec::Fp8 => Codec::Fp8,
        QuantizedCodec::Int8 => Codec::Int8,
        QuantizedCodec::Int4 => Codec::Int4,
        QuantizedCodec::Int2 => Codec::Int2,
        QuantizedCodec::Int4Channel | QuantizedCodec::Int2Channel | QuantizedCodec::Pq { .. } => {
            return unsupported(format!("{q} rows of a plan"));
        }
    };
    Ok(Format { codec, group: q.group, hadamard: q.hadamard })
}

fn unsupported<T>(what: impl Into<String>) -> Result<T> {
    Err(kvlar::Error::Unsupported { op: "cache", what: what.into() }.into())
}

impl QuantizedLayer {
    /// As a plan says; `None` for layers that keep no codes. A side that stays dense beside codes has the type of the model.
    pub fn planned(device: &Device, stream: &Stream, config: &CacheConfig, layer: usize, plan: &Plan) -> Result<Option<Self>> {
        let sides = [&plan.layers[layer].keys, &plan.layers[layer].values];
        if sides.iter().all(|s| s.quantized().is_none()) {
            return Ok(None);
        }
        if sides.iter().any(|s| s.factors().is_some()) {
            return invalid("plan", format!("layer {layer} has latents beside codes: no attention reads both"));
        }
        if plan.sink_rows + plan.recent_rows > 0 {
            return unsupported("exact rows beside the codes of a plan: calibrate with --sinks 0 --recent 0");
        }
        let of = |side: &Side| side.quantized().map_or(Ok(native(config.dtype).into()), |q| format(q.format));
        let upload = |side: &Side| {
            let Some(values) = side.quantized().and_then(|q| q.codebooks.as_ref()) else { return Ok(None) };
            let mut buffer = device.alloc(4 * values.len())?;
            stream.upload(&mut buffer, 0, bytemuck::cast_slice(values))?;
            Ok::<_, crate::CacheError>(Some(buffer))
        };
        let [keys, values] = sides;
        Ok(Some(Self { formats: [of(keys)?, of(values)?], codebooks: [upload(keys)?, upload(values)?] }))
    }

    /// What rows of a head share.
    pub fn tables(&self) -> Tables<'_> {
        let [keys, values] = self.codebooks.each_ref().map(|b| b.as_ref().map(Buffer::view));
        Tables { keys, values }
    }

    /// Bytes of the codebooks.
    pub fn bytes(&self) -> usize {
        self.codebooks.iter().flatten().map(Buffer::len).sum()
    }
}

/// Plans of all layers of one pair of formats, and their work list.
#[derive(Debug)]
pub(crate) struct QuantizedPlans {
    formats: [Format; 2],
    pub append: AppendPlan,
    pub attend: AttendPlan,
    pub work: WorkList,
    /// Whether the work list is that of this step.
    pub scheduled: bool,
}

/// Plans of a batch's quantized layers: one for each pair of formats, and which one is each layer's.
#[derive(Debug, Default)]
pub(crate) struct QuantizedBatch {
    plans: Vec<QuantizedPlans>,
    of_layer: Vec<Option<usize>>,
}

impl QuantizedBatch {
    /// From the shapes of layers that keep rows as they are.
    pub fn new(
        device: &Device,
        config: &CacheConfig,
        append: AppendShape,
        attend: AttendShape,
        layers: &[Layer],
    ) -> Result<Self> {
        let mut all = Self::default();
        for layer in layers {
            let Some(formats) = layer.quantized.as_ref().map(|q| q.formats) else {
                all.of_layer.push(None);
                continue;
            };
            let known = all.plans.iter().position(|p| p.formats == formats);
            all.of_layer.push(Some(known.unwrap_or(all.plans.len())));
            if known.is_some() {
                continue;
            }
            let [keys, values] = formats;
            let mut segments = [None; kvlar::MAX_SEGMENTS];
            segments[0] = Some(SegmentShape { keys, values, max_rows: config.max_rows });
            let attend = AttendShape { segments, ..attend }.plan(device)?;
            let append = AppendShape { key_format: keys, value_format: values, ..append }.plan(device)?;
            all.plans.push(QuantizedPlans { formats, append, work: attend.work_list(device)?, attend, scheduled: false });
        }
        Ok(all)
    }

    /// Of a layer; `None` where it keeps no codes.
    pub fn of(&self, layer: usize) -> Option<&QuantizedPlans> {
        self.plans.get(self.of_layer.get(layer).copied().flatten()?)
    }

    /// Likewise.
    pub fn of_mut(&mut self, layer: usize) -> Option<&mut QuantizedPlans> {
        self.plans.get_mut(self.of_layer.get(layer).copied().flatten()?)
    }

    /// No work list is that of the step that begins.
    pub fn begin(&mut self) {
        self.plans.iter_mut().for_each(|p| p.scheduled = false);
    }

    /// Scratch that is enough for each.
    pub fn workspace(&self) -> WorkspaceSize {
        self.plans.iter().fold(WorkspaceSize::default(), |size, p| size.max(p.attend.workspace()))
    }

    /// Bytes of the work lists.
    pub fn work_bytes(&self) -> usize {
        self.plans.iter().map(|p| p.attend.work_list_bytes()).sum()
    }
}
