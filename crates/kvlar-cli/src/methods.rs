//! The methods that the table compares. A method is a way to make a store; adding one here is all it takes.

use crate::calibrate::{Calibration, plan, pq_plan};
use anyhow::{Context, Result, bail};
use kvlar::{Codec, Device, Format};
use kvlar_cache::{Policy, Size};
use kvlar_calibrate::gate::Gates;
use kvlar_calibrate::{Budget, Grouping, Latent, Plan, PqConfig, RecalkvConfig, ValueFit, Weighting};
use kvlar_candle::llama::{Llama, Protocol};
use kvlar_candle::{EvictingStore, EvictingStoreConfig, KvShape, KvStore, PagedStore, StoreConfig};
use std::path::Path;
use std::sync::Arc;

/// What a store must be good for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Tokens that it holds at most.
    pub tokens: usize,
    /// Tokens that it takes back as if they had never been.
    pub rollback: usize,
}

type MakeStore = dyn Fn(&Device, &KvShape, Room) -> kvlar_candle::Result<Box<dyn KvStore>> + Send + Sync;

/// A way to keep keys and values.
pub struct Method {
    /// On the command line and in the table.
    pub name: String,
    /// One line.
    pub about: String,
    /// When it lets go of tokens, if it does.
    pub protocol: Protocol,
    /// An empty store.
    pub store: Box<MakeStore>,
}

fn token_wise(name: &str, about: &str, keys: impl Into<Format>, values: impl Into<Format>) -> Method {
    let (keys, values) = (keys.into(), values.into());
    Method {
        name: name.into(),
        about: about.into(),
        protocol: Protocol::Context,
        store: Box::new(move |d, s, room| Ok(Box::new(PagedStore::new(d, s, StoreConfig::of(keys, values, room.tokens))?))),
    }
}

/// KIVI (arXiv 2402.02750): keys channel-wise in groups of 32 rows, values in groups of 32, the last 32 rows at least and the
/// unfinished group as they are.
fn kivi(name: &str, about: &str, keys: Codec, values: Codec) -> Method {
    const GROUP: usize = 32;
    let store: Box<MakeStore> = Box::new(move |d, s, room| {
        let group = s.head_dim.is_multiple_of(GROUP).then_some(GROUP);
        let values = Format { group, ..values.into() };
        let config = StoreConfig {
            recent_rows: GROUP,
            rollback_rows: room.rollback,
            ..StoreConfig::of(Format { group: Some(GROUP), ..keys.into() }, values, room.tokens)
        };
        Ok(Box::new(PagedStore::new(d, s, config)?))
    });
    Method { name: name.into(), about: about.into(), protocol: Protocol::Context, store }
}

/// What all methods are compared with.
pub fn full() -> Method {
    token_wise("bf16", "full cache in bf16", Codec::Bf16, Codec::Bf16)
}

/// Methods that need no calibration.
pub fn uncalibrated() -> Vec<Method> {
    let rotated = |codec: Codec| Format { hadamard: true, ..codec.into() };
    vec![
        full(),
        token_wise("fp8", "keys and values in e4m3, scale 1", Codec::Fp8, Codec::Fp8),
        token_wise("int8", "keys and values in 8 bits, a scale and zero a row", Codec::Int8, Codec::Int8),
        token_wise("int4", "keys and values in 4 bits, likewise", Codec::Int4, Codec::Int4),
        token_wise("int4+hadamard", "likewise, keys rotated", rotated(Codec::Int4), Codec::Int4),
        token_wise("k4v2", "rotated keys in 4 bits, values in 2", rotated(Codec::Int4), Codec::Int2),
        kivi("kivi-int4", "KIVI: 4 bits, a key's scales a channel, 32 to 63 last rows exact", Codec::Int4Channel, Codec::Int4),
        kivi("kivi-int2", "likewise, 2 bits", Codec::Int2Channel, Codec::Int2),
    ]
}

/// A method that keeps what a plan says.
pub fn planned(name: impl Into<String>, about: impl Into<String>, plan: Plan) -> Method {
    Method {
        name: name.into(),
        about: about.into(),
        protocol: Protocol::Context,
        store: Box::new(move |d, s, room| {
            let config = StoreConfig { rollback_rows: room.rollback, ..StoreConfig::bf16(room.tokens) };
            Ok(Box::new(PagedStore::planned(d, s, config, &plan)?))
        }),
    }
}

/// Tokens of a prompt that are read at a time where what goes goes chunk by chunk: contexts of the table's tasks take several.
const PROMPT_CHUNK: usize = 512;

/// A method that lets go of tokens.
fn evicting(name: &str, about: &str, protocol: Protocol, rows: impl Into<Rows>, policy: Policy) -> Method {
    let rows = rows.into();
    Method {
        name: name.into(),
        about: about.into(),
        protocol,
        store: Box::new(move |d, s, room| {
            let config =
                EvictingStoreConfig { prompt_chunk: PROMPT_CHUNK, ..EvictingStoreConfig::bf16(room.tokens, policy.clone()) };
            Ok(Box::new(match &rows {
                Rows::Of(keys, values) => {
                    EvictingStore::new(d, s, EvictingStoreConfig { keys: *keys, values: *values, ..config })?
                }
                Rows::Planned(plan) => EvictingStore::planned(d, s, config, plan)?,
            }))
        }),
    }
}

/// How rows are kept that stay.
enum Rows {
    Of(Format, Format),
    Planned(Box<Plan>),
}

impl From<Codec> for Rows {
    fn from(codec: Codec) -> Self {
        Self::Of(codec.into(), codec.into())
    }
}

/// 4 bits, with keys rotated.
fn int4_rotated() -> Rows {
    Rows::Of(Format { hadamard: true, ..Codec::Int4.into() }, Codec::Int4.into())
}

/// Tokens go by the attention that they get. DynamicKV and SnapKV are made for
/// prompts whose end is the question.
pub fn evicting_by_attention() -> Vec<Method> {
    use Protocol::{Context, Question};
    let percent = |n: u32| Size::Share(f64::from(n) / 100.0);
    let mut methods = Vec::new();
    for n in [50, 12, 7, 2] {
        let about = format!("DynamicKV, {n} % of tokens stay; layers share them by attention of the prompt's end");
        methods.push(evicting(&format!("dynamickv-{n}"), &about, Question, Codec::Bf16, Policy::dynamickv(percent(n))));
    }
    let about = "likewise, 12 %, in 4 bits with rotated keys";
    methods.push(evicting("dynamickv-12-int4", about, Question, int4_rotated(), Policy::dynamickv(percent(12))));
    let blind = "likewise, 12 %, before the question is seen";
    methods.push(evicting("dynamickv-12-blind", blind, Context, Codec::Bf16, Policy::dynamickv(percent(12))));
    methods.push(evicting("snapkv-12", "SnapKV, 12 % stay", Question, Codec::Bf16, Policy::snapkv(percent(12))));
    let blind = "likewise, before the question is seen";
    methods.push(evicting("snapkv-12-blind", blind, Context, Codec::Bf16, Policy::snapkv(percent(12))));
    methods
}

/// KVzip: contexts must leave room for their repetition among the model's positions.
pub fn repeated() -> Method {
    let about = "KVzip, 30 % stay by attention when the model repeats the context";
    evicting("kvzip-30", about, Protocol::Context, Codec::Bf16, Policy::kvzip(Size::Share(0.3)))
}

/// Fast KVzip, alone and over rows that are stored in less: the savings multiply.
pub fn gated(gates: &Arc<Gates>, latents: Option<Plan>) -> Vec<Method> {
    // The window of the paper; 2 % of contexts this short.
    let policy = |n: u32| Policy::fast_kvzip(gates.clone(), f64::from(n) / 100.0, 4096);
    let mut methods = Vec::new();
    for n in [50, 30, 20] {
        let about = format!("Fast KVzip, {n} % stay by gates of hidden states");
        methods.push(evicting(&format!("fast-kvzip-{n}"), &about, Protocol::Context, Codec::Bf16, policy(n)));
    }
    for n in [30, 20] {
        let about = format!("likewise, {n} % stay, in 4 bits with rotated keys");
        methods.push(evicting(&format!("fast-kvzip-{n}-int4"), &about, Protocol::Context, int4_rotated(), policy(n)));
    }
    if let Some(plan) = latents {
        let about = "likewise, 30 % stay, as latents of ReCalKV at 50 %";
        methods.push(evicting("fast-kvzip-30-recalkv", about, Protocol::Context, Rows::Planned(Box::new(plan)), policy(30)));
    }
    methods
}

/// Gates of a file, for a model.
pub fn read_gates(path: &Path, model: &Llama) -> Result<Arc<Gates>> {
    let gates = Gates::read(path)?;
    gates.check_model(&model.fingerprint()?, &crate::calibrate::shape(model)).with_context(|| path.display().to_string())?;
    Ok(Arc::new(gates))
}

/// The plan of a file, for a model of that fingerprint.
pub fn from_file(path: &Path, fingerprint: &str) -> Result<Method> {
    let plan = Plan::read(path)?;
    plan.check_model(fingerprint).with_context(|| path.display().to_string())?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(planned(name, format!("plan file {}", path.display()), plan))
}

/// ReCalKV as the table's rows have it: ranks where they save most, all rows latents.
fn recalkv(kept: f64, groups: (usize, usize)) -> RecalkvConfig {
    RecalkvConfig {
        kept,
        key_group: groups.0,
        value_group: groups.1,
        budget: Budget::Spectral,
        weighting_keys: Weighting::Query,
        weighting_values: Weighting::Output,
        sink_rows: 0,
        recent_rows: 0,
        ..RecalkvConfig::default()
    }
}

/// ReCalKV at 50, 60 and 70 % removed, with latents in 16 and in 4 bits, and at 70 % without head grouping, without
/// calibrated values and without both (the ablation of ReCalKV, table 3); keys product-quantized to 4 bits a number.
pub fn calibrated(calibration: &Calibration<'_>) -> Result<Vec<Method>> {
    let layer = crate::calibrate::shape(calibration.model()).layer;
    let groups = (2.min(layer.kv_heads), 4.min(layer.kv_heads));
    let fits = |n: usize| if layer.kv_heads.is_multiple_of(n) { n } else { 1 };
    let groups = (fits(groups.0), fits(groups.1));
    let mut methods = Vec::new();
    let mut add = |name: String, about: String, config: RecalkvConfig| -> Result<()> {
        let (plan, _) = plan(calibration, &config).with_context(|| name.clone())?;
        methods.push(planned(name, about, plan));
        Ok(())
    };
    for removed in [50, 60, 70] {
        let kept = 1.0 - f64::from(removed) / 100.0;
        add(format!("recalkv-{removed}"), format!("ReCalKV, {removed} % removed"), recalkv(kept, groups))?;
        // The same ranks in a quarter of the bytes, and 4 bytes of scale and zero a row and group.
        let rows = layer.kv_heads / groups.0 + layer.kv_heads / groups.1;
        let scales = (4 * rows) as f64 / (2 * layer.kv_heads * (layer.head_dim + layer.value_dim)) as f64;
        let int4 =
            RecalkvConfig { latent_keys: Latent::Int4, latent_values: Latent::Int4, ..recalkv(kept / 4.0 + scales, groups) };
        add(format!("recalkv-{removed}-int4"), format!("ReCalKV, {removed} % removed, latents in 4 bits"), int4)?;
    }
    let natural = |grouping, values| RecalkvConfig { grouping, values, ..recalkv(0.3, groups) };
    let ablation = [
        ("hsr", "without calibrated values", Grouping::Best, ValueFit::WeightSvd),
        ("ovc", "without grouping of similar heads", Grouping::Natural, ValueFit::Closed),
        ("neither", "without both", Grouping::Natural, ValueFit::WeightSvd),
    ];
    for (name, about, grouping, values) in ablation {
        // A basis from weights alone knows nothing of what the output projection makes of values.
        let weighting_values = if values == ValueFit::Closed { Weighting::Output } else { Weighting::None };
        let config = RecalkvConfig { weighting_values, ..natural(grouping, values) };
        add(format!("recalkv-70-{name}"), format!("ReCalKV, 70 % removed, {about}"), config)?;
    }
    methods.extend(product_quantized(calibration)?);
    Ok(methods)
}

/// ReCalKV at 50 %, as a plan.
pub fn latents(calibration: &Calibration<'_>) -> Result<Plan> {
    let heads = crate::calibrate::shape(calibration.model()).layer.kv_heads;
    let fits = |n: usize| if heads.is_multiple_of(n) { n } else { 1 };
    Ok(plan(calibration, &recalkv(0.5, (fits(2), fits(4))))?.0)
}

/// Keys in a byte a pair of dimensions (PQ-64 where d = 128), values in 4 bits. Too little text for as many centroids as a
/// byte can name makes do with fewer; none where keys have no pairs.
fn product_quantized(calibration: &Calibration<'_>) -> Result<Option<Method>> {
    let (model, windows) = (calibration.model(), calibration.windows());
    let d = crate::calibrate::shape(model).layer.head_dim;
    if !d.is_multiple_of(2) {
        return Ok(None);
    }
    let (m, c) = (d / 2, windows.iter().map(Vec::len).sum::<usize>().clamp(1, 256));
    let name = format!("pq-{m}");
    let (plan, _) = pq_plan(model, windows, &PqConfig::new(m, c)).with_context(|| name.clone())?;
    Ok(Some(planned(name, format!("keys as {m} bytes, each one of {c} centroids; values in int4"), plan)))
}

/// The method of that name.
pub fn find<'a>(methods: &'a [Method], name: &str) -> Result<&'a Method> {
    let names: Vec<_> = methods.iter().map(|m| m.name.as_str()).collect();
    methods.iter().find(|m| m.name == name).ok_or_else(|| anyhow::anyhow!("no method {name:?} ({})", names.join(", ")))
}

/// Refuses methods of one name: they could not be told apart.
pub fn check_names(methods: &[Method]) -> Result<()> {
    for (i, m) in methods.iter().enumerate() {
        if let Some(other) = methods[..i].iter().find(|o| o.name == m.name) {
            bail!("two methods are called {:?}: {}, and {}; rename a plan file", m.name, other.about, m.about);
        }
    }
    Ok(())
}
