//! What calibration takes of a model, against an independent forward pass and the checkpoint's own tensors.

use crate::checkpoint::{Checkpoint, Variant};
use crate::plain::{Plain, families, tokens};
use kvlar_candle::EngineError;
use kvlar_candle::llama::Llama;

#[track_caller]
fn near(actual: &[f32], expected: &[Vec<Vec<f64>>], what: &str) {
    let expected: Vec<f64> = expected.iter().flatten().flatten().copied().collect();
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (&a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(a) - e).abs() < 1e-4, "{what}: number {i} is {a} instead of {e}");
    }
}

#[test]
fn captured_rows_are_those_of_a_plain_forward_pass() {
    for (v, c, rotary) in families() {
        let model = Llama::load(c.folder()).unwrap();
        let tokens = tokens(19, v.vocab);
        let (expected, _) = Plain::new(&c, &v, rotary).run(&tokens);
        let mut layers = Vec::new();
        model
            .capture(&tokens, |layer, q, k, values| {
                let name = |what: &str| format!("{}, layer {layer}, {what}", v.name);
                near(q, &expected[layer].q, &name("q"));
                near(k, &expected[layer].k, &name("k"));
                near(values, &expected[layer].v, &name("v"));
                layers.push(layer);
                Ok(())
            })
            .unwrap();
        assert_eq!(layers, (0..v.layers).collect::<Vec<_>>(), "{}", v.name);
    }
}

/// Longer than the query rows whose scores exist at a time.
#[test]
fn a_long_window_is_seen_as_a_whole() {
    let v = Variant { layers: 2, hidden: 16, intermediate: 16, ..Variant::llama("long") };
    let c = Checkpoint::write(&v);
    let model = Llama::load(c.folder()).unwrap();
    let tokens = tokens(300, v.vocab);
    let (expected, _) = Plain::new(&c, &v, v.head_dim).run(&tokens);
    let observe = |layer: usize, _: &[f32], k: &[f32], _: &[f32]| {
        near(k, &expected[layer].k, &format!("layer {layer}"));
        Ok(())
    };
    model.capture(&tokens, observe).unwrap();
}

#[test]
fn an_observer_ends_the_run() {
    let c = Checkpoint::write(&Variant::llama("x"));
    let model = Llama::load(c.folder()).unwrap();
    let mut calls = 0;
    let result = model.capture(&[3, 4, 5], |layer, _, _, _| {
        calls += 1;
        Err(EngineError::Input(format!("enough of layer {layer}")))
    });
    assert_eq!(result.unwrap_err().to_string(), "enough of layer 0");
    assert_eq!(calls, 1);
}

#[test]
fn bad_windows_are_named() {
    let c = Checkpoint::write(&Variant::llama("x"));
    let model = Llama::load(c.folder()).unwrap();
    let capture = |tokens: &[u32]| model.capture(tokens, |_, _, _, _| Ok(())).unwrap_err().to_string();
    assert!(capture(&[]).contains("without tokens"));
    assert!(capture(&[3, 40]).contains("token 40"));
}

#[test]
fn weights_are_as_stored() {
    let v = Variant { head_dim: 24, heads: 6, ..Variant::llama("x") };
    let c = Checkpoint::write(&v);
    let model = Llama::load(c.folder()).unwrap();
    for layer in 0..v.layers {
        let stored = |part: &str| c.tensor(&format!("model.layers.{layer}.self_attn.{part}.weight"));
        assert_eq!(model.out_weight(layer).unwrap(), stored("o_proj"));
        assert_eq!(model.value_weight(layer).unwrap(), stored("v_proj"));
    }
    assert!(model.out_weight(2).unwrap_err().to_string().contains("no layer 2"));
    assert!(model.value_weight(7).unwrap_err().to_string().contains("the model has 2"));
}

fn fingerprint(c: &Checkpoint) -> String {
    Llama::load(c.folder()).unwrap().fingerprint().unwrap()
}

#[test]
fn a_fingerprint_is_of_the_numbers_not_of_the_files() {
    let v = Variant::llama("x");
    let once = fingerprint(&Checkpoint::write(&v));
    assert!(once.starts_with("llama-2x32-"), "{once}");
    assert_eq!(once, fingerprint(&Checkpoint::write(&v)));
    assert_eq!(once, fingerprint(&Checkpoint::write(&Variant { parts: 3, ..v })));
}

#[test]
fn a_fingerprint_tells_models_apart() {
    let v = Variant::llama("x");
    let once = fingerprint(&Checkpoint::write(&v));
    let others = [
        Variant { theta: 10001.0, ..v.clone() },
        Variant { eps: 1e-6, ..v.clone() },
        Variant { heads: 2, head_dim: 16, kv_heads: 1, ..v.clone() },
        Variant { model_type: "mistral", ..v.clone() },
        Variant { model_type: "mistral", window: 8, ..v.clone() },
        Variant { llama3: Some((8.0, 1.0, 4.0, 16.0)), ..v.clone() },
        Variant { qkv_bias: true, model_type: "qwen2", ..v.clone() },
    ];
    let mut all: Vec<String> = others.iter().map(|v| fingerprint(&Checkpoint::write(v))).collect();
    all.push(once);
    for (i, a) in all.iter().enumerate() {
        assert!(!all[..i].contains(a), "{i}: {a}");
    }
}

/// Adds to the first number of a stored tensor; such small tensors are taken in whole.
#[test]
fn a_fingerprint_sees_every_tensor() {
    use safetensors::SafeTensors;
    let v = Variant { qk_norm: true, model_type: "qwen3", tied: false, layers: 1, ..Variant::llama("x") };
    let c = Checkpoint::write(&v);
    let before = fingerprint(&c);
    let path = c.folder().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let names: Vec<String> = SafeTensors::deserialize(&bytes).unwrap().names().iter().map(|n| n.to_string()).collect();
    assert_eq!(names.len(), 14);
    for name in names {
        let at =
            SafeTensors::deserialize(&bytes).unwrap().tensor(&name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        assert_ne!(before, fingerprint(&c), "{name}");
    }
}
