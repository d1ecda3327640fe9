//! A missing, truncated or contradictory file is an error that names it.

use crate::checkpoint::{Checkpoint, Variant};
use kvlar::{Codec, Device};
use kvlar_candle::llama::{Llama, Logits, RecallTask, Sampler, Sampling, generate};
use kvlar_candle::{EngineError, KvStore, PagedStore, StoreConfig};

#[track_caller]
fn fails(c: &Checkpoint, words: &[&str]) -> EngineError {
    let Err(e) = Llama::load(c.folder()) else { panic!("it loaded") };
    let text = e.to_string();
    for w in words {
        assert!(text.contains(w), "{text:?} does not say {w:?}");
    }
    e
}

#[test]
fn missing_files_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let c = Checkpoint::write(&Variant::llama("x"));
        std::fs::remove_file(c.folder().join(name)).unwrap();
        assert!(matches!(fails(&c, &[name]), EngineError::MissingFile { .. }));
    }
    let c = Checkpoint::write(&Variant { parts: 2, ..Variant::llama("x") });
    std::fs::remove_file(c.folder().join("model-1.safetensors")).unwrap();
    assert!(matches!(fails(&c, &["model-1.safetensors"]), EngineError::MissingFile { .. }));
}

#[test]
fn broken_files_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let c = Checkpoint::write(&Variant::llama("x"));
        let path = c.folder().join(name);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(matches!(fails(&c, &[name]), EngineError::BadFile { .. }));
    }
    let c = Checkpoint::write(&Variant { parts: 2, ..Variant::llama("x") });
    std::fs::write(c.folder().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    fails(&c, &["index.json", "not a file of the folder"]);
    std::fs::write(c.folder().join("model.safetensors.index.json"), "{}").unwrap();
    fails(&c, &["index.json", "weight_map"]);
}

/// Writes a checkpoint, then another configuration over it.
fn with_config(change: impl FnOnce(&mut serde_json::Value)) -> Checkpoint {
    let v = Variant::llama("x");
    let c = Checkpoint::write(&v);
    let mut config = v.config();
    change(&mut config);
    std::fs::write(c.folder().join("config.json"), config.to_string()).unwrap();
    c
}

#[test]
fn contradictions_are_named() {
    let set = |key: &'static str, value: serde_json::Value| with_config(move |c| c[key] = value);
    fails(&set("num_key_value_heads", 3.into()), &["config.json", "num_key_value_heads 3"]);
    fails(&set("num_hidden_layers", 0.into()), &["num_hidden_layers is 0"]);
    fails(&set("head_dim", 12.into()), &["head_dim 12"]);
    fails(&set("model_type", "gpt2".into()), &["gpt2", "llama"]);
    fails(&set("hidden_act", "gelu".into()), &["gelu"]);
    fails(&set("rope_scaling", serde_json::json!({"rope_type": "dynamic", "factor": 2.0})), &["dynamic"]);
    fails(&set("rope_scaling", serde_json::json!({"rope_type": "llama3", "factor": 2.0})), &["low_freq_factor"]);
    // The configuration and the weights disagree.
    let e = fails(&set("intermediate_size", 64.into()), &["mlp.gate_proj.weight", "[48, 32]", "[64, 32]"]);
    assert!(matches!(e, EngineError::BadTensor { .. }));
    let e = fails(&set("num_hidden_layers", 3.into()), &["model.layers.2."]);
    assert!(matches!(e, EngineError::MissingTensor { .. }));
    fails(&set("tie_word_embeddings", false.into()), &["lm_head.weight"]);
    let c = with_config(|c| c["vocab_size"] = 30.into());
    fails(&c, &["tokenizer.json", "39", "30"]);
    fails(&with_config(|c| _ = c.as_object_mut().unwrap().remove("hidden_size")), &["config.json", "hidden_size"]);
}

#[test]
fn bad_input_leaves_the_store_as_it_was() {
    let c = Checkpoint::write(&Variant::llama("x"));
    let model = Llama::load(c.folder()).unwrap();
    let mut store = PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::bf16(16)).unwrap();
    assert!(matches!(model.prefill(&mut store, &[1, 99], Logits::Last), Err(EngineError::Input(t)) if t.contains("99")));
    assert!(model.prefill(&mut store, &[], Logits::Last).is_err());
    model.prefill(&mut store, &[1, 2, 3], Logits::Last).unwrap();
    assert!(matches!(model.prefill(&mut store, &[1], Logits::Last), Err(EngineError::Input(_))));
    // The cache is full: an error, and then it works as before.
    let e = model.extend(&mut store, &[4; 14], Logits::Last).unwrap_err();
    assert!(matches!(e, EngineError::Cache(_)) && e.to_string().contains("17"), "{e}");
    assert_eq!(store.len(), 3);
    model.extend(&mut store, &[4; 13], Logits::Last).unwrap();
    assert!(store.truncate(17).is_err());
}

#[test]
fn sampling_and_tasks_are_checked() {
    let random = |temperature, top_p| Sampler::new(Sampling::Random { temperature, top_p, seed: 1 });
    assert!(
        random(0.0, 1.0).is_err() && random(1.0, 0.0).is_err() && random(1.0, 1.1).is_err() && random(f32::NAN, 1.0).is_err()
    );
    let e = RecallTask::parse("{\"context\": \"a\", \"questions\": []}\n{").unwrap_err();
    assert!(e.to_string().contains("line 2"), "{e}");
}

#[test]
fn generation_is_repeatable_and_ends() {
    let c = Checkpoint::write(&Variant::llama("x"));
    let model = Llama::load(c.folder()).unwrap();
    let run = |sampling| {
        let mut store =
            PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::of(Codec::Int8, Codec::Int8, 64)).unwrap();
        let mut pieces = String::new();
        let text = generate(&model, &mut store, "t5 t6 t7", 12, sampling, |p| pieces.push_str(p)).unwrap();
        assert_eq!(pieces, text);
        text
    };
    let sampled = |seed| Sampling::Random { temperature: 1.0, top_p: 0.9, seed };
    assert_eq!(run(Sampling::Greedy), run(Sampling::Greedy));
    assert_eq!(run(sampled(3)), run(sampled(3)));
    assert!((0..8).any(|s| run(sampled(s)) != run(sampled(s + 1))), "seeds make no difference");
    // The least nucleus is the likeliest token.
    assert_eq!(run(Sampling::Random { temperature: 1.0, top_p: 1e-6, seed: 5 }), run(Sampling::Greedy));
}
