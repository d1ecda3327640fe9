//! Logits against an independent forward pass: plain loops in f64 over the checkpoint's own tensors.

use crate::checkpoint::{Checkpoint, Variant};
use crate::plain::Plain;
use kvlar::Device;
use kvlar_candle::llama::{Llama, Logits};
use kvlar_candle::{KvStore, PagedStore, StoreConfig};

fn check(actual: &candle_core::Tensor, expected: &[Vec<f64>], tolerance: f64, what: &str) {
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
    let plain = Plain::new(&c, v, v.head_dim);
    // Exact prefill; then one token, then several at once, from the cache.
    let mut store = PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::bf16(64)).unwrap();
    let prefill = model.prefill(&mut store, context, Logits::All).unwrap();
    check(&prefill, &plain.run(context).1, 2e-4, &format!("{} prefill", v.name));
    let expected = plain.run_cached(&tokens, context.len()).1;
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
