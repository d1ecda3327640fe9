//! An independent forward pass: plain loops in f64 over a checkpoint's tensors, any of which may be changed.
#![allow(dead_code)] // each test program uses a part of it

use crate::checkpoint::{Checkpoint, Variant};
use half::bf16;
use std::collections::HashMap;

/// `[n][heads][d]`.
type Heads = Vec<Vec<Vec<f64>>>;

/// Queries (rotated), keys (before RoPE) and values of one layer.
#[derive(Default)]
pub struct Rows {
    pub q: Heads,
    pub k: Heads,
    pub v: Heads,
}

pub struct Plain {
    v: Variant,
    /// Dimensions of a head that rotate.
    rotary: usize,
    pub tensors: HashMap<String, Vec<f64>>,
}

fn matvec(w: &[f64], x: &[f64], bias: Option<&Vec<f64>>) -> Vec<f64> {
    let row = |(i, r): (usize, &[f64])| r.iter().zip(x).map(|(a, b)| a * b).sum::<f64>() + bias.map_or(0.0, |b| b[i]);
    w.chunks(x.len()).enumerate().map(row).collect()
}

fn norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).map(|(v, w)| v / (mean + eps).sqrt() * w).collect()
}

fn each_head(rows: &Heads, f: impl Fn(usize, &[f64]) -> Vec<f64>) -> Heads {
    rows.iter().enumerate().map(|(position, heads)| heads.iter().map(|head| f(position, head)).collect()).collect()
}

fn to_bf16(rows: &Heads) -> Heads {
    each_head(rows, |_, head| head.iter().map(|&x| bf16::from_f64(x).to_f64()).collect())
}

impl Plain {
    pub fn new(c: &Checkpoint, v: &Variant, rotary: usize) -> Self {
        let mut names: Vec<String> = vec!["model.embed_tokens.weight".into(), "model.norm.weight".into()];
        if !v.tied {
            names.push("lm_head.weight".into());
        }
        for layer in 0..v.layers {
            let mut parts: Vec<&str> = vec!["input_layernorm.weight", "post_attention_layernorm.weight"];
            parts.extend(["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]);
            parts.extend(["self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]);
            if v.qkv_bias {
                parts.extend(["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]);
            }
            if v.qk_norm {
                parts.extend(["self_attn.q_norm.weight", "self_attn.k_norm.weight"]);
            }
            names.extend(parts.iter().map(|p| format!("model.layers.{layer}.{p}")));
        }
        let tensors = names.into_iter().map(|n| (n.clone(), c.tensor(&n).iter().map(|&x| f64::from(x)).collect())).collect();
        Self { v: v.clone(), rotary, tensors }
    }

    /// Hugging Face's rotate_half, at frequencies worked out here once more.
    fn rotate(&self, x: &[f64], position: usize) -> Vec<f64> {
        let half = self.rotary / 2;
        let mut y = x.to_vec();
        for i in 0..half {
            let mut f = self.v.theta.powf(-2.0 * i as f64 / self.rotary as f64);
            if let Some((factor, low, high, original)) = self.v.llama3 {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                if wavelength > original / low {
                    f /= factor;
                } else if wavelength >= original / high {
                    let smooth = (original / wavelength - low) / (high - low);
                    f = (1.0 - smooth) * f / factor + smooth * f;
                }
            }
            let (sin, cos) = (position as f64 * f).sin_cos();
            y[i] = x[i] * cos - x[i + half] * sin;
            y[i + half] = x[i + half] * cos + x[i] * sin;
        }
        y
    }

    /// Rows of each layer, and logits after every token.
    pub fn run(&self, tokens: &[u32]) -> (Vec<Rows>, Vec<Vec<f64>>) {
        self.run_cached(tokens, usize::MAX)
    }

    /// Likewise; tokens from `cached` on attend as a bf16 cache lets them: q and v rounded, k rounded as it comes and again
    /// when it is rotated.
    pub fn run_cached(&self, tokens: &[u32], cached: usize) -> (Vec<Rows>, Vec<Vec<f64>>) {
        let v = &self.v;
        let group = v.heads / v.kv_heads;
        let t = |name: &str| &self.tensors[name];
        let embedding = t("model.embed_tokens.weight");
        let mut xs: Vec<Vec<f64>> = tokens.iter().map(|&id| embedding[id as usize * v.hidden..][..v.hidden].to_vec()).collect();
        let mut layers = Vec::new();
        for layer in 0..v.layers {
            let at = |part: &str| t(&format!("model.layers.{layer}.{part}"));
            let mut rows = Rows::default();
            for (p, x) in xs.iter().enumerate() {
                let x = norm(x, at("input_layernorm.weight"), v.eps);
                let project = |part: &str| {
                    let bias = v.qkv_bias.then(|| at(&format!("self_attn.{part}_proj.bias")));
                    let y = matvec(at(&format!("self_attn.{part}_proj.weight")), &x, bias);
                    let normed = |head: &[f64]| match v.qk_norm && part != "v" {
                        true => norm(head, at(&format!("self_attn.{part}_norm.weight")), v.eps),
                        false => head.to_vec(),
                    };
                    y.chunks(v.head_dim).map(normed).collect::<Vec<_>>()
                };
                rows.q.push(project("q").iter().map(|head| self.rotate(head, p)).collect());
                rows.k.push(project("k"));
                rows.v.push(project("v"));
            }
            let rotated = |k: &Heads| each_head(k, |position, head| self.rotate(head, position));
            let keys = rotated(&rows.k);
            let stored = (cached < xs.len()).then(|| Rows {
                q: to_bf16(&rows.q),
                k: to_bf16(&rotated(&to_bf16(&rows.k))),
                v: to_bf16(&rows.v),
            });
            for p in 0..xs.len() {
                let (q, k, values) = match &stored {
                    Some(rows) if p >= cached => (&rows.q, &rows.k, &rows.v),
                    _ => (&rows.q, &keys, &rows.v),
                };
                let from = if v.window > 0 { (p + 1).saturating_sub(v.window) } else { 0 };
                let mut attended = Vec::new();
                for head in 0..v.heads {
                    let weight = |k: &Vec<Vec<f64>>| {
                        let dot: f64 = q[p][head].iter().zip(&k[head / group]).map(|(a, b)| a * b).sum();
                        (dot / (v.head_dim as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = k[from..=p].iter().map(weight).collect();
                    let sum: f64 = weights.iter().sum();
                    let mut out = vec![0.0; v.head_dim];
                    for (value, w) in values[from..=p].iter().zip(&weights) {
                        value[head / group].iter().zip(&mut out).for_each(|(x, o)| *o += w / sum * x);
                    }
                    attended.extend(out);
                }
                let out = matvec(at("self_attn.o_proj.weight"), &attended, None);
                let x: Vec<f64> = xs[p].iter().zip(out).map(|(a, b)| a + b).collect();
                let y = norm(&x, at("post_attention_layernorm.weight"), v.eps);
                let (gate, up) = (matvec(at("mlp.gate_proj.weight"), &y, None), matvec(at("mlp.up_proj.weight"), &y, None));
                let gated: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let down = matvec(at("mlp.down_proj.weight"), &gated, None);
                xs[p] = x.iter().zip(down).map(|(a, b)| a + b).collect();
            }
            layers.push(rows);
        }
        let head = t(if v.tied { "model.embed_tokens.weight" } else { "lm_head.weight" });
        let logits = xs.iter().map(|x| matvec(head, &norm(x, t("model.norm.weight"), v.eps), None)).collect();
        (layers, logits)
    }

    /// Mean of −ln p of every token but the first.
    pub fn loss(&self, tokens: &[u32]) -> f64 {
        let (_, logits) = self.run(tokens);
        let nll = |(row, &next): (&Vec<f64>, &u32)| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[next as usize];
        logits.iter().zip(&tokens[1..]).map(nll).sum::<f64>() / (tokens.len() - 1) as f64
    }
}

/// A checkpoint of each family, and how many dimensions of its heads rotate.
pub fn families() -> Vec<(Variant, Checkpoint, usize)> {
    let llama = Variant { theta: 500000.0, llama3: Some((8.0, 1.0, 4.0, 16.0)), ..Variant::llama("llama 3") };
    let mistral = Variant { model_type: "mistral", window: 5, tied: false, parts: 2, ..Variant::llama("mistral") };
    let qwen2 = Variant { model_type: "qwen2", qkv_bias: true, eps: 1e-6, ..Variant::llama("qwen2") };
    let qwen3 = Variant { model_type: "qwen3", qk_norm: true, head_dim: 24, heads: 6, kv_heads: 2, ..Variant::llama("qwen3") };
    let partial = Variant { head_dim: 16, ..Variant::llama("partial rotary") };
    let whole = [llama, mistral, qwen2, qwen3].map(|v| {
        let c = Checkpoint::write(&v);
        let rotary = v.head_dim;
        (v, c, rotary)
    });
    let c = Checkpoint::write(&partial);
    let mut config = partial.config();
    config["partial_rotary_factor"] = serde_json::json!(0.5);
    std::fs::write(c.folder().join("config.json"), config.to_string()).unwrap();
    whole.into_iter().chain([(partial, c, 8)]).collect()
}

pub fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 5 + i * 7 + 3) % vocab) as u32).collect()
}
