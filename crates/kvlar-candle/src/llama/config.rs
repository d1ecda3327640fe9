//! config.json.

use crate::{EngineError, Result};
use kvlar_reference::{Rope, RopeLayout, RopeScaling, Yarn};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// Architectures that the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2, 3 and what shares its architecture.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Biases on q, k and v.
    Qwen2,
    /// RMS norm of each q and k head.
    Qwen3,
}

/// A checkpoint's configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which architecture.
    pub family: Family,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// L.
    pub layers: usize,
    /// Hq.
    pub heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// d.
    pub head_dim: usize,
    /// Of RMS norms.
    pub eps: f64,
    /// How q and k are rotated.
    pub rope: Rope,
    /// Longest context of training.
    pub max_positions: usize,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// 0 = none.
    pub window: u32,
    /// First token of a prompt.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f64>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<u32>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    hidden_act: Option<String>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}

/// One id, a list of them, or nothing.
fn ids(value: &Option<Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|x| u32::try_from(x).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}

impl Config {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`EngineError::BadFile`], naming the field.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let bad = |problem: String| EngineError::BadFile { path: path.into(), problem };
        let raw: Raw = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let family = match raw.model_type.as_str() {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => return Err(bad(format!("model_type {other:?} is not supported (llama, mistral, qwen2, qwen3)"))),
        };
        let (heads, kv_heads) = (raw.num_attention_heads, raw.num_key_value_heads.unwrap_or(raw.num_attention_heads));
        let sizes = [
            ("vocab_size", raw.vocab_size),
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(bad(format!("{name} is 0")));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(bad(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")));
        }
        let head_dim = match raw.head_dim {
            Some(d) => d,
            None if raw.hidden_size.is_multiple_of(heads) => raw.hidden_size / heads,
            None => return Err(bad(format!("hidden_size {} is not a multiple of num_attention_heads {heads}", raw.hidden_size))),
        };
        if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > 256 {
            return Err(bad(format!("head_dim {head_dim} is not a multiple of 8 up to 256")));
        }
        if let Some(act) = raw.hidden_act.as_deref().filter(|a| !["silu", "swish"].contains(a)) {
            return Err(bad(format!("hidden_act {act:?} is not supported (silu)")));
        }
        // Qwen carries a window that it may not use, or use in some layers only.
        let used = raw.use_sliding_window.unwrap_or(family == Family::Mistral);
        let window = raw.sliding_window.filter(|_| used).unwrap_or(0);
        if window > 0 && raw.max_window_layers.is_some_and(|n| n > 0) {
            return Err(bad("a sliding window in some layers only (max_window_layers) is not supported".into()));
        }
        Ok(Self {
            family,
            rope: rope(&raw, head_dim).map_err(bad)?,
            vocab: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            eps: raw.rms_norm_eps,
            max_positions: raw.max_position_embeddings,
            tied: raw.tie_word_embeddings,
            qkv_bias: raw.attention_bias || family == Family::Qwen2,
            out_bias: raw.attention_bias && family != Family::Qwen2,
            mlp_bias: raw.mlp_bias,
            window,
            bos: ids(&raw.bos_token_id).first().copied(),
            eos: ids(&raw.eos_token_id),
        })
    }
}

/// RoPE as the configuration describes it: `rope_theta` and `rope_scaling`, or both in `rope_parameters`.
fn rope(raw: &Raw, head_dim: usize) -> std::result::Result<Rope, String> {
    let scaling = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).filter(|v| !v.is_null());
    let get = |name: &str| scaling.and_then(|s| s.get(name)).and_then(Value::as_f64);
    let need = |name: &str| get(name).ok_or(format!("rope_scaling has no {name}"));
    let theta = get("rope_theta").or(raw.rope_theta).unwrap_or(10000.0);
    let partial = get("partial_rotary_factor").or(raw.partial_rotary_factor).unwrap_or(1.0);
    let rotary = (head_dim as f64 * partial) as usize;
    if theta <= 1.0 || rotary == 0 || rotary > head_dim || !rotary.is_multiple_of(2) {
        return Err(format!("rope_theta {theta} with {rotary} of {head_dim} dimensions rotated"));
    }
    let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type"))).and_then(Value::as_str).unwrap_or("default");
    let original = || get("original_max_position_embeddings");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear(need("factor")?),
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max: need("original_max_position_embeddings")?,
        },
        "yarn" => {
            let plain = Yarn::new(need("factor")?, original().unwrap_or(raw.max_position_embeddings as f64));
            RopeScaling::Yarn(Yarn {
                beta_fast: get("beta_fast").unwrap_or(plain.beta_fast),
                beta_slow: get("beta_slow").unwrap_or(plain.beta_slow),
                attention_factor: get("attention_factor"),
                mscale: get("mscale"),
                mscale_all_dim: get("mscale_all_dim"),
                truncate: scaling.and_then(|s| s.get("truncate")).and_then(Value::as_bool).unwrap_or(true),
                ..plain
            })
        }
        other => return Err(format!("rope_type {other:?} is not supported (default, linear, llama3, yarn)")),
    };
    Ok(Rope::new(theta, rotary, RopeLayout::Half, scaling))
}
