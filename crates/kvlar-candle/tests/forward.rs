//! Logits against an independent forward pass: plain loops in f64 over the checkpoint's own tensors.

mod checkpoint;

use checkpoint::{Checkpoint, Variant};
use half::bf16;
use kvlar::Device;
use kvlar_candle::llama::{Llama, Logits};
use kvlar_candle::{KvStore, PagedStore, StoreConfig};

type Vector = Vec<f64>;

fn matvec(w: &[f32], x: &[f64], bias: Option<&[f32]>) -> Vector {
    let row = |(i, r): (usize, &[f32])| {
        r.iter().zip(x).map(|(&a, b)| f64::from(a) * b).sum::<f64>() + bias.map_or(0.0, |b| f64::from(b[i]))
    };
    w.chunks(x.len()).enumerate().map(row).collect()
}

fn norm(x: &[f64], w: &[f32], eps: f64) -> Vector {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).map(|(v, &w)| v / (mean + eps).sqrt() * f64::from(w)).collect()
}

/// Hugging Face's rotate_half, at frequencies worked out here once more.
fn rotate(x: &[f64], position: usize, v: &Variant) -> Vector {
    let (d, half) = (x.len(), x.len() / 2);
    let mut y = x.to_vec();
    for i in 0..half {
        let mut f = v.theta.powf(-2.0 * i as f64 / d as f64);
        if let Some((factor, low, high, original)) = v.llama3 {
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

fn to_bf16(x: &[f64]) -> Vector {
    x.iter().map(|&v| bf16::from_f64(v).to_f64()).collect()
}

/// Logits after every token. Tokens from `cached` on attend as a bf16 cache lets them: q and v rounded, k rounded as it
/// comes and again when it is rotated.
fn forward(c: &Checkpoint, v: &Variant, tokens: &[u32], cached: usize) -> Vec<Vector> {
    let (h, d) = (v.hidden, v.head_dim);
    let group = v.heads / v.kv_heads;
    let t = |name: &str| c.tensor(name);
    let mut xs: Vec<Vector> = tokens
        .iter()
        .map(|&id| t("model.embed_tokens.weight")[id as usize * h..][..h].iter().map(|&x| f64::from(x)).collect())
        .collect();
    for layer in 0..v.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let project = |x: &[f64], part: &str, bias: bool| {
            let b = bias.then(|| c.tensor(&name(&format!("self_attn.{part}.bias"))));
            matvec(&c.tensor(&name(&format!("self_attn.{part}.weight"))), x, b.as_deref())
        };
        let heads = |x: Vector, norm_name: &str, position: Option<usize>| -> Vec<Vector> {
            x.chunks(d)
                .map(|head| {
                    let head = match (v.qk_norm, position) {
                        (true, _) if !norm_name.is_empty() => {
                            norm(head, &c.tensor(&name(&format!("self_attn.{norm_name}.weight"))), v.eps)
                        }
                        _ => head.to_vec(),
                    };
                    position.map_or(head.clone(), |p| rotate(&head, p, v))
                })
                .collect()
        };
        let (mut qs, mut ks, mut vs) = (Vec::new(), Vec::new(), Vec::new());
        for (p, x) in xs.iter().enumerate() {
            let x = norm(x, &c.tensor(&name("input_layernorm.weight")), v.eps);
            qs.push(heads(project(&x, "q_proj", v.qkv_bias), "q_norm", Some(p)));
            ks.push(heads(project(&x, "k_proj", v.qkv_bias), "k_norm", None));
            vs.push(heads(project(&x, "v_proj", v.qkv_bias), "", None));
        }
        for p in 0..xs.len() {
            let rounded = |x: &Vector| if p >= cached { to_bf16(x) } else { x.clone() };
            let key = |s: usize, head: usize| rounded(&rotate(&rounded(&ks[s][head]), s, v));
            let mut attended = Vec::new();
            for head in 0..v.heads {
                let q = rounded(&qs[p][head]);
                let from = if v.window > 0 { (p + 1).saturating_sub(v.window) } else { 0 };
                let logit = |s: usize| q.iter().zip(key(s, head / group)).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt();
                let logits: Vector = (from..=p).map(logit).collect();
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vector = logits.iter().map(|l| (l - top).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut out = vec![0.0; d];
                for (s, w) in (from..=p).zip(&weights) {
                    rounded(&vs[s][head / group]).iter().zip(&mut out).for_each(|(x, o)| *o += w / sum * x);
                }
                attended.extend(out);
            }
            let out = matvec(&c.tensor(&name("self_attn.o_proj.weight")), &attended, None);
            let x: Vector = xs[p].iter().zip(out).map(|(a, b)| a + b).collect();
            let y = norm(&x, &c.tensor(&name("post_attention_layernorm.weight")), v.eps);
            let gate = matvec(&c.tensor(&name("mlp.gate_proj.weight")), &y, None);
            let up = matvec(&c.tensor(&name("mlp.up_proj.weight")), &y, None);
            let gated: Vector = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let down = matvec(&c.tensor(&name("mlp.down_proj.weight")), &gated, None);
            xs[p] = x.iter().zip(down).map(|(a, b)| a + b).collect();
        }
    }
    let head = c.tensor(if v.tied { "model.embed_tokens.weight" } else { "lm_head.weight" });
    xs.iter().map(|x| matvec(&head, &norm(x, &c.tensor("model.norm.weight"), v.eps), None)).collect()
}

fn check(actual: &candle_core::Tensor, expected: &[Vector], tolerance: f64, what: &str) {
    let rows = actual.to_vec2::<f32>().unwrap();
    assert_eq!(rows.len(), expected.len());
    for (i, (row, expected)) in rows.iter().zip(expected).enumerate() {
        for (j, (&a, e)) in row.iter().zip(expected).enumerate() {
            assert!((f64::from(a) - e).abs() < tolerance, "{what}: logit {j} after token {i} is {a} instead of {e}");
        }
    }
}

fn run(v: &Variant) {
    let c = Checkpoint::write(v);
    let model = Llama::load(c.folder()).unwrap();
    let tokens: Vec<u32> = (0..41).map(|i| (i * 7 + 3) % v.vocab as u32).collect();
    let (context, rest) = tokens.split_at(30);
    // Exact prefill; then one token, then several at once, from the cache.
    let mut store = PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::bf16(64)).unwrap();
    let prefill = model.prefill(&mut store, context, Logits::All).unwrap();
    check(&prefill, &forward(&c, v, context, usize::MAX), 2e-4, &format!("{} prefill", v.name));
    let expected = forward(&c, v, &tokens, 30);
    let one = model.extend(&mut store, &rest[..1], Logits::All).unwrap();
    // A q, k or v near the middle of two bf16 values may round the other way in f32 than in f64: a few of them do.
    check(&one, &expected[30..31], 1e-2, &format!("{} decode", v.name));
    let more = model.extend(&mut store, &rest[1..], Logits::All).unwrap();
    check(&more, &expected[31..], 1e-2, &format!("{} several", v.name));
    assert_eq!(store.len(), tokens.len());
    // Taking tokens back and running them again changes nothing.
    store.truncate(31).unwrap();
    let again = model.extend(&mut store, &rest[1..], Logits::All).unwrap();
    assert_eq!(more.to_vec2::<f32>().unwrap(), again.to_vec2::<f32>().unwrap());
}

#[test]
fn llama_with_untied_embeddings_in_parts() {
    run(&Variant { tied: false, parts: 3, ..Variant::llama("llama in parts") });
}

#[test]
fn llama_3_rope_scaling() {
    run(&Variant { theta: 500000.0, llama3: Some((8.0, 1.0, 4.0, 16.0)), ..Variant::llama("llama 3") });
}

#[test]
fn mistral_with_a_window() {
    run(&Variant { model_type: "mistral", window: 9, tied: false, ..Variant::llama("mistral") });
}

#[test]
fn qwen2_with_biases() {
    run(&Variant { model_type: "qwen2", qkv_bias: true, eps: 1e-6, ..Variant::llama("qwen2") });
}

#[test]
fn qwen3_with_norms_and_its_own_head_dim() {
    run(&Variant { model_type: "qwen3", qk_norm: true, head_dim: 24, heads: 6, kv_heads: 2, ..Variant::llama("qwen3") });
}
