//! Small random checkpoints, written as Hugging Face does.
#![allow(dead_code)] // each test program uses a part of it

use kvlar_reference::testing::Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What kind of checkpoint.
#[derive(Clone, Debug)]
pub struct Variant {
    pub name: &'static str,
    pub model_type: &'static str,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    pub theta: f64,
    /// factor, low_freq_factor, high_freq_factor, original context
    pub llama3: Option<(f64, f64, f64, f64)>,
    pub window: usize,
    pub tied: bool,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    pub parts: usize,
}

impl Variant {
    pub fn llama(name: &'static str) -> Self {
        Self {
            name,
            model_type: "llama",
            vocab: 40,
            hidden: 32,
            intermediate: 48,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            eps: 1e-5,
            theta: 10000.0,
            llama3: None,
            window: 0,
            tied: true,
            qkv_bias: false,
            qk_norm: false,
            parts: 1,
        }
    }

    pub fn config(&self) -> Value {
        let mut c = json!({
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "max_position_embeddings": 64,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": [1, 2],
        });
        if let Some((factor, low, high, original)) = self.llama3 {
            c["rope_scaling"] = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            });
        }
        if self.window > 0 {
            c["sliding_window"] = json!(self.window);
        }
        c
    }

    fn tensors(&self) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let mut rng = Rng::new(17);
        let mut all = BTreeMap::new();
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut add = |name: String, shape: Vec<usize>| {
            let n: usize = shape.iter().product();
            let values = if name.contains("norm") {
                rng.normals(n, 0.2).iter().map(|x| 1.0 + x).collect()
            } else {
                rng.normals(n, if name.contains("bias") { 0.3 } else { 1.2 / (shape[shape.len() - 1] as f32).sqrt() })
            };
            let values = values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
            all.insert(name, (shape, values));
        };
        add("model.embed_tokens.weight".into(), vec![self.vocab, h]);
        add("model.norm.weight".into(), vec![h]);
        if !self.tied {
            add("lm_head.weight".into(), vec![self.vocab, h]);
        }
        for i in 0..self.layers {
            let mut at = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}"), shape.to_vec());
            at("input_layernorm.weight", &[h]);
            at("post_attention_layernorm.weight", &[h]);
            for (name, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                at(&format!("self_attn.{name}.weight"), &[rows, h]);
                if self.qkv_bias {
                    at(&format!("self_attn.{name}.bias"), &[rows]);
                }
            }
            at("self_attn.o_proj.weight", &[h, q]);
            if self.qk_norm {
                at("self_attn.q_norm.weight", &[self.head_dim]);
                at("self_attn.k_norm.weight", &[self.head_dim]);
            }
            at("mlp.gate_proj.weight", &[self.intermediate, h]);
            at("mlp.up_proj.weight", &[self.intermediate, h]);
            at("mlp.down_proj.weight", &[h, self.intermediate]);
        }
        all
    }
}

/// A checkpoint in a temporary folder.
pub struct Checkpoint {
    dir: tempfile::TempDir,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Checkpoint {
    pub fn write(v: &Variant) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tensors = v.tensors();
        std::fs::write(dir.path().join("config.json"), v.config().to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer(v.vocab)).unwrap();
        let bytes: BTreeMap<&String, Vec<u8>> = tensors
            .iter()
            .map(|(n, (_, x))| (n, x.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()))
            .collect();
        let view = |n: &String| (n.clone(), TensorView::new(Dtype::BF16, tensors[n].0.clone(), &bytes[n]).unwrap());
        let mut map = serde_json::Map::new();
        for part in 0..v.parts {
            let names: Vec<&String> = tensors.keys().enumerate().filter(|(i, _)| i % v.parts == part).map(|x| x.1).collect();
            let file = if v.parts == 1 { "model.safetensors".to_string() } else { format!("model-{part}.safetensors") };
            safetensors::serialize_to_file(names.iter().map(|n| view(n)), None, &dir.path().join(&file)).unwrap();
            map.extend(names.iter().map(|n| ((*n).clone(), json!(file))));
        }
        if v.parts > 1 {
            let index = json!({"metadata": {}, "weight_map": map});
            std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        Self { dir, tensors }
    }

    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    pub fn tensor(&self, name: &str) -> Vec<f32> {
        self.tensors.get(name).unwrap_or_else(|| panic!("{name}")).1.clone()
    }
}

/// A tokenizer whose words are "t0", "t1", …
fn tokenizer(vocab: usize) -> String {
    let words: serde_json::Map<String, Value> = (0..vocab).map(|i| (format!("t{i}"), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t3"},
    })
    .to_string()
}
