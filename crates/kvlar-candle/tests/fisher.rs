//! Gradients against finite differences of an independent forward pass in f64, and the importances made of them.

use crate::checkpoint::{Checkpoint, Variant};
use crate::plain::{Plain, families, tokens};
use candle_core::Tensor;
use kvlar_candle::llama::{Fisher, Gradients, Llama};

/// A gradient `[hidden, Hk·d]` as the checkpoint stores its matrix: `[Hk·d, hidden]`.
fn as_stored(gradient: &Tensor) -> Vec<f32> {
    gradient.t().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn gradients_are_finite_differences() {
    for (v, c, rotary) in families() {
        let model = Llama::load(c.folder()).unwrap();
        let tokens = tokens(11, v.vocab);
        let mut plain = Plain::new(&c, &v, rotary);
        let Gradients { loss, layers } = model.gradients(&tokens).unwrap();
        let expected = plain.loss(&tokens);
        assert!((loss - expected).abs() < 1e-4, "{}: loss {loss} instead of {expected}", v.name);
        assert_eq!(layers.len(), v.layers);
        for (layer, pair) in layers.iter().enumerate() {
            for (part, gradient) in ["k_proj", "v_proj"].iter().zip(pair) {
                let name = format!("model.layers.{layer}.self_attn.{part}.weight");
                let actual = as_stored(gradient);
                assert_eq!(actual.len(), plain.tensors[&name].len());
                let size = (actual.iter().map(|x| x * x).sum::<f32>() / actual.len() as f32).sqrt();
                assert!(size > 1e-5, "{}: {name} has no gradient to compare", v.name);
                for at in (0..actual.len()).step_by(actual.len() / 23) {
                    let mut loss_at = |step: f64| {
                        let stored = plain.tensors[&name][at];
                        plain.tensors.get_mut(&name).unwrap()[at] = stored + step;
                        let loss = plain.loss(&tokens);
                        plain.tensors.get_mut(&name).unwrap()[at] = stored;
                        loss
                    };
                    let expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
                    let difference = (f64::from(actual[at]) - expected).abs();
                    assert!(
                        difference < 1e-3 * f64::from(size),
                        "{}: {name}, number {at}: {} instead of {expected} (they are about {size})",
                        v.name,
                        actual[at]
                    );
                }
            }
        }
    }
}

/// More tokens than queries and logits that exist at a time, with and without a sliding window.
#[test]
fn a_long_window_is_in_parts() {
    let v = Variant { layers: 1, hidden: 16, intermediate: 16, ..Variant::llama("long") };
    for v in [v.clone(), Variant { model_type: "mistral", window: 40, ..v }] {
        let c = Checkpoint::write(&v);
        let model = Llama::load(c.folder()).unwrap();
        let tokens = tokens(300, v.vocab);
        let mut plain = Plain::new(&c, &v, v.head_dim);
        let Gradients { loss, layers } = model.gradients(&tokens).unwrap();
        assert!((loss - plain.loss(&tokens)).abs() < 1e-4);
        for (part, gradient) in ["k_proj", "v_proj"].iter().zip(&layers[0]) {
            let (name, actual) = (format!("model.layers.0.self_attn.{part}.weight"), as_stored(gradient));
            let size = actual.iter().map(|x| x.abs()).fold(0.0, f32::max);
            for at in [0, 101, 200] {
                let mut loss_at = |step: f64| {
                    plain.tensors.get_mut(&name).unwrap()[at] += step;
                    let loss = plain.loss(&tokens);
                    plain.tensors.get_mut(&name).unwrap()[at] -= step;
                    loss
                };
                let expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
                assert!(
                    (f64::from(actual[at]) - expected).abs() < 1e-3 * f64::from(size),
                    "{name}: {} not {expected}",
                    actual[at]
                );
            }
        }
    }
}

#[test]
fn importance_is_the_mean_root_mean_square_gradient() {
    let v = Variant::llama("x");
    let c = Checkpoint::write(&v);
    let model = Llama::load(c.folder()).unwrap();
    let windows: Vec<Vec<u32>> =
        (0..3).map(|i| tokens(9 + i, v.vocab).into_iter().map(|t| (t + i as u32) % 40).collect()).collect();
    let mut fisher = Fisher::new();
    assert!(fisher.importance().unwrap().is_empty());
    let mut gradients = Vec::new();
    for w in &windows {
        let g = model.gradients(w).unwrap();
        assert_eq!(fisher.add(&model, w).unwrap(), g.loss);
        gradients.push(g);
    }
    assert_eq!(fisher.windows(), 3);
    let importance = fisher.importance().unwrap();
    assert_eq!(importance.len(), v.layers);
    for (layer, pair) in importance.iter().enumerate() {
        for (side, &actual) in pair.iter().enumerate() {
            let all: Vec<Vec<f32>> = gradients.iter().map(|g| as_stored(&g.layers[layer][side])).collect();
            let root = |i: usize| (all.iter().map(|g| f64::from(g[i]).powi(2)).sum::<f64>() / 3.0).sqrt();
            let expected = (0..all[0].len()).map(root).sum::<f64>() / all[0].len() as f64;
            assert!((actual / expected - 1.0).abs() < 1e-4, "layer {layer}, side {side}: {actual} instead of {expected}");
        }
    }
}

/// Labels are the next tokens: the last token has a part in the loss, and the first has none as a label.
#[test]
fn labels_are_the_next_tokens() {
    let v = Variant::llama("x");
    let c = Checkpoint::write(&v);
    let model = Llama::load(c.folder()).unwrap();
    let (a, b) = (model.gradients(&[7, 8, 9]).unwrap(), model.gradients(&[7, 8, 10]).unwrap());
    assert_ne!(a.loss, b.loss);
    let two = model.gradients(&[7, 8]).unwrap();
    assert!((two.loss - Plain::new(&c, &v, v.head_dim).loss(&[7, 8])).abs() < 1e-4);
}

#[test]
fn bad_windows_are_named_and_add_nothing() {
    let c = Checkpoint::write(&Variant::llama("x"));
    let model = Llama::load(c.folder()).unwrap();
    let mut fisher = Fisher::new();
    assert!(fisher.add(&model, &[]).unwrap_err().to_string().contains("needs two"));
    assert!(fisher.add(&model, &[3]).unwrap_err().to_string().contains("needs two"));
    assert!(fisher.add(&model, &[3, 40]).unwrap_err().to_string().contains("token 40"));
    assert_eq!(fisher.windows(), 0);
    assert!(fisher.importance().unwrap().is_empty());
}

/// What `Fisher::add` says of a checkpoint, all numbers of one tensor overwritten.
fn refusal(tensor: &str, value: half::bf16) -> String {
    use safetensors::SafeTensors;
    let c = Checkpoint::write(&Variant::llama("x"));
    let path = c.folder().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let data = stored.tensor(tensor).unwrap().data();
    let (at, len) = (data.as_ptr() as usize - bytes.as_ptr() as usize, data.len());
    bytes[at..at + len].chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&value.to_le_bytes()));
    std::fs::write(&path, &bytes).unwrap();
    let mut fisher = Fisher::new();
    let error = fisher.add(&Llama::load(c.folder()).unwrap(), &[3, 4, 5]).unwrap_err();
    assert_eq!(fisher.windows(), 0);
    error.to_string()
}

#[test]
fn what_is_not_finite_is_named() {
    let text = refusal("model.layers.1.self_attn.o_proj.weight", half::bf16::NAN);
    assert!(text.contains("the loss is NaN"), "{text}");
    // Logits of about 1e25: the loss is finite, the square of a gradient is not.
    let text = refusal("model.norm.weight", half::bf16::from_f32(1e25));
    assert!(text.contains("layer 1: the loss has no finite gradient by k_proj"), "{text}");
}
