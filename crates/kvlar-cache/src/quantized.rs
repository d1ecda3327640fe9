//! Layers of a plan whose rows are codes: what kernels call their formats, and what the rows of a head share.

use crate::error::invalid;
use crate::exact::{EXACT_PAGE_ROWS, ExactShape, Leaving};
use crate::layer::{Layer, native};
use crate::{CacheConfig, Result};
use kvlar::{
    AppendGroupsPlan, AppendGroupsShape, AppendPlan, AppendShape, AttendPlan, AttendShape, Buffer, Codec, Device, EncodeShape,
    Format, SegmentShape, Stream, Tables, TranscodePlan, WorkList, WorkspaceSize,
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
fn format(q: QuantizedFormat, dim: usize) -> Result<Format> {
    let codec = match q.codec {
        QuantizedCodec::Fp8 => Codec::Fp8,
        QuantizedCodec::Int8 => Codec::Int8,
        QuantizedCodec::Int4 => Codec::Int4,
        QuantizedCodec::Int2 => Codec::Int2,
        QuantizedCodec::Int4Channel => Codec::Int4Channel,
        QuantizedCodec::Int2Channel => Codec::Int2Channel,
        QuantizedCodec::Pq { subvectors, centroids } => {
            if subvectors == 0 || !dim.is_multiple_of(subvectors) {
                return invalid("plan", format!("{subvectors} sub-vectors of rows of {dim} values"));
            }
            return Ok(Format { hadamard: q.hadamard, ..Format::pq(dim / subvectors, centroids) });
        }
    };
    Ok(Format { group: q.group, hadamard: q.hadamard, ..codec.into() })
}

/// Formats of the layers that a plan keeps as codes.
pub(crate) fn planned_formats(config: &CacheConfig, plan: &Plan) -> Result<Vec<[Format; 2]>> {
    let quantized = plan.layers.iter().filter(|l| [&l.keys, &l.values].into_iter().any(|s| s.quantized().is_some()));
    let (d, dv) = (config.head_dim, config.value_dim);
    quantized.map(|l| Ok([side_format(config, &l.keys, d)?, side_format(config, &l.values, dv)?])).collect()
}

/// Of a side beside codes, or of codes.
fn side_format(config: &CacheConfig, side: &Side, dim: usize) -> Result<Format> {
    side.quantized().map_or(Ok(native(config.dtype).into()), |q| format(q.format, dim))
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
        let upload = |side: &Side| {
            let Some(values) = side.quantized().and_then(|q| q.codebooks.as_ref()) else { return Ok(None) };
            let mut buffer = device.alloc(4 * values.len())?;
            stream.upload(&mut buffer, 0, bytemuck::cast_slice(values))?;
            Ok::<_, crate::CacheError>(Some(buffer))
        };
        let [keys, values] = sides;
        Ok(Some(Self {
            formats: [side_format(config, keys, config.head_dim)?, side_format(config, values, config.value_dim)?],
            codebooks: [upload(keys)?, upload(values)?],
        }))
    }

    /// Of given formats; codebooks are a plan's.
    pub fn of(keys: Format, values: Format) -> Self {
        Self { formats: [keys, values], codebooks: [None, None] }
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

/// Which rows stay exact in layers whose formats these are, if `sinks` and `recent` are asked for; `all`: there are no other
/// layers. Rows leave together that are encoded together.
pub(crate) fn exact_shape(config: &CacheConfig, asked: ExactShape, formats: &[[Format; 2]], all: bool) -> Result<ExactShape> {
    let (mut shape, dims) = (asked, [config.head_dim, config.value_dim]);
    let mut channels = false;
    for (format, dim) in formats.iter().flat_map(|f| f.iter().zip(dims)).filter(|(f, _)| f.codec.is_channel_wise()) {
        let group = format.group_of(dim);
        if !group.is_multiple_of(EXACT_PAGE_ROWS) {
            return unsupported(format!("groups of {group} rows: multiples of {EXACT_PAGE_ROWS} are"));
        }
        if !config.page_rows.is_multiple_of(group) {
            return invalid("page_rows", format!("pages of {} rows hold no whole groups of {group}", config.page_rows));
        }
        if channels && group != shape.group {
            return unsupported(format!("layers with groups of {} and of {group} rows", shape.group));
        }
        (shape.group, channels) = (group, true);
    }
    if !formats.is_empty() && (channels || shape.sinks + shape.recent > 0) {
        shape.leaving = if all { Leaving::EncodedInAll } else { Leaving::EncodedInSome };
    }
    Ok(shape)
}

/// How new rows are written.
#[derive(Debug)]
pub(crate) enum Writing {
    /// In their formats at once.
    Encoded(AppendPlan),
    /// As they are, and in their formats once they leave the view of exact rows.
    Groups(Box<AppendGroupsPlan>),
}

/// Plans of all layers of one pair of formats, and their work list.
#[derive(Debug)]
pub(crate) struct RowPlans {
    formats: [Format; 2],
    /// Whether some rows stay exact.
    exact: bool,
    pub append: Writing,
    /// How rows are decoded before attention, keys and values, where no kernel attends over their formats.
    pub decode: Option<Box<[TranscodePlan; 2]>>,
    pub attend: AttendPlan,
    pub work: WorkList,
    /// Whether the work list is that of this step.
    pub scheduled: bool,
}

/// Plans of a batch's layers that keep no latents: one for each pair of formats, and which one is each layer's.
#[derive(Debug, Default)]
pub(crate) struct RowBatch {
    plans: Vec<RowPlans>,
    of_layer: Vec<Option<usize>>,
}

impl RowBatch {
    /// From shapes whose formats and segments are not used.
    pub fn new(
        device: &Device,
        config: &CacheConfig,
        exact: &ExactShape,
        append: AppendShape,
        attend: AttendShape,
        layers: &[Layer],
    ) -> Result<Self> {
        let mut all = Self::default();
        for layer in layers {
            if layer.lowrank.is_some() {
                all.of_layer.push(None);
                continue;
            }
            let (formats, keeps) = (layer.rows.formats(), layer.exact.is_some());
            let known = all.plans.iter().position(|p| (p.formats, p.exact) == (formats, keeps));
            all.of_layer.push(Some(known.unwrap_or(all.plans.len())));
            if known.is_some() {
                continue;
            }
            let [keys, values] = formats;
            let own = native(config.dtype);
            let part = |pages: usize| (pages > 0).then_some(SegmentShape::new(own, pages * EXACT_PAGE_ROWS));
            let planned = |body: SegmentShape| {
                let sinks_and_recent = [exact.sink_pages(), exact.recent_pages()].map(|n| part(n).filter(|_| keeps));
                let parts = [sinks_and_recent[0], Some(body), sinks_and_recent[1]];
                let mut segments = [None; kvlar::MAX_SEGMENTS];
                segments.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, segment)| *to = Some(segment));
                AttendShape { segments, ..attend }.plan(device)
            };
            let (attend, decode) = match planned(SegmentShape { keys, values, max_rows: config.max_rows }) {
                Ok(plan) => (plan, None),
                Err(e @ kvlar::Error::Unsupported { .. }) => {
                    // Decoded rows have the type of the model; if that is what there is no kernel for, say so.
                    let plan = planned(SegmentShape::new(own, config.max_rows)).map_err(|_| e)?;
                    let (seqs, heads, rows) = (append.seqs, config.kv_heads, config.max_rows);
                    let decode = |format, dim| EncodeShape { format, dtype: config.dtype, seqs, heads, rows, dim }.plan(device);
                    (plan, Some(Box::new([decode(keys, config.head_dim)?, decode(values, config.value_dim)?])))
                }
                Err(e) => return Err(e.into()),
            };
            let append = if !keeps {
                Writing::Encoded(AppendShape { key_format: keys, value_format: values, ..append }.plan(device)?)
            } else {
                let new = AppendShape { key_format: own.into(), value_format: own.into(), ..append };
                let (pack_rows, max_packs) = (exact.group, append.new_rows.div_ceil(exact.group) + 1);
                let shape = AppendGroupsShape { append: new, key_format: keys, value_format: values, pack_rows, max_packs };
                Writing::Groups(Box::new(shape.plan(device)?))
            };
            let work = attend.work_list(device)?;
            all.plans.push(RowPlans { formats, exact: keeps, append, decode, work, attend, scheduled: false });
        }
        Ok(all)
    }

    /// Of a layer; `None` where it keeps latents.
    pub fn of(&self, layer: usize) -> Option<&RowPlans> {
        self.plans.get(self.of_layer.get(layer).copied().flatten()?)
    }

    /// Likewise.
    pub fn of_mut(&mut self, layer: usize) -> Option<&mut RowPlans> {
        self.plans.get_mut(self.of_layer.get(layer).copied().flatten()?)
    }

    /// Whether some layer's rows are decoded before attention.
    pub fn decodes(&self) -> bool {
        self.plans.iter().any(|p| p.decode.is_some())
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
