//! Scores of repetition: as the reference op gives them, of the rows of an independent forward pass over context, prompt and
//! repeated chunk in one piece.

use crate::checkpoint::{Checkpoint, Variant};
use crate::plain::{Plain, families, tokens};
use kvlar_candle::EngineError;
use kvlar_candle::llama::{Llama, RepeatConfig};
use kvlar_reference::{RepeatInput, score_repeat};

/// Prompts of 3, 2 and 1 tokens.
fn config(chunk: usize) -> RepeatConfig {
    RepeatConfig { chunk, quoted: 3, first: "t5 t6 t7".into(), next: "t8 t9".into(), end: "t10".into() }
}

/// `[heads, n, d]` of `[n][heads][d]`, some of the rows.
fn heads(rows: &[Vec<Vec<f64>>], n: std::ops::Range<usize>) -> Vec<f32> {
    (0..rows[0].len()).flat_map(|h| rows[n.clone()].iter().flat_map(move |r| r[h].iter().map(|x| *x as f32))).collect()
}

#[test]
fn scores_are_those_of_one_plain_pass() {
    for (v, c, rotary) in families() {
        // Room within the window, where there is one.
        let (v, c) = if v.window > 0 {
            let v = Variant { window: 40, ..v };
            (v.clone(), Checkpoint::write(&v))
        } else {
            (v, c)
        };
        let model = Llama::load(c.folder()).unwrap();
        let plain = Plain::new(&c, &v, rotary);
        let (prefix, context) = (vec![0, 4], tokens(13, v.vocab));
        for chunk in [20, 13, 5] {
            let mut found = Vec::new();
            let observe = |layer: usize, hidden: &[f32], scores: &[f32]| {
                assert_eq!((layer, hidden.len(), scores.len()), (found.len(), 13 * v.hidden, v.kv_heads * 13));
                found.push(scores.to_vec());
                Ok(())
            };
            model.repeat_scores(&prefix, &context, &config(chunk), observe).unwrap();
            assert_eq!(found.len(), v.layers);
            for start in (0..13).step_by(chunk) {
                let len = chunk.min(13 - start);
                let mut prompt: Vec<u32> = if start == 0 { vec![5, 6, 7] } else { vec![8, 9] };
                prompt.extend(&context[start.saturating_sub(3)..start]);
                prompt.push(10);
                prompt.extend(&context[start..start + len]);
                let (n, rows) = (prompt.len(), prefix.len() + 13);
                let (layers, _) = plain.run(&[&prefix[..], &context, &prompt].concat());
                for (layer, all) in layers.iter().enumerate() {
                    let keys: Vec<f32> = all.k.iter().flatten().flatten().map(|x| *x as f32).collect();
                    let rotated = model.rotate_keys(&keys).unwrap();
                    let at = |h: usize, t: usize| &rotated[(t * v.kv_heads + h) * v.head_dim..][..v.head_dim];
                    let keys: Vec<f32> =
                        (0..v.kv_heads).flat_map(|h| (0..rows + n).flat_map(move |t| at(h, t).to_vec())).collect();
                    let expected = score_repeat(&RepeatInput {
                        q_heads: v.heads,
                        kv_heads: v.kv_heads,
                        queries: n,
                        rows,
                        head_dim: v.head_dim,
                        q: &heads(&all.q, rows..rows + n),
                        k: &keys,
                        sink: 2,
                        start: 2 + start,
                        len,
                        scale: None,
                    })
                    .unwrap();
                    for (i, e) in expected.iter().enumerate() {
                        let (h, t) = (i / len, start + i % len);
                        let a = found[layer][h * 13 + t];
                        assert!(
                            (a - e).abs() < 1e-5,
                            "{}, chunk {chunk}, layer {layer}, head {h}, token {t}: {a}, not {e}",
                            v.name
                        );
                    }
                }
            }
        }
    }
}

/// More queries than weights that exist at a time.
#[test]
fn a_long_repetition_is_in_parts() {
    let v = Variant { layers: 1, hidden: 16, intermediate: 16, ..Variant::llama("long") };
    let c = Checkpoint::write(&v);
    let mut settings = v.config();
    settings["max_position_embeddings"] = serde_json::json!(1000);
    std::fs::write(c.folder().join("config.json"), settings.to_string()).unwrap();
    let model = Llama::load(c.folder()).unwrap();
    let context = tokens(300, v.vocab);
    let mut input = context.clone();
    input.extend([5, 6, 7, 10]);
    input.extend(&context);
    let (mut q, mut k) = (Vec::new(), Vec::new());
    model
        .capture(&[&context[..], &input[300..]].concat(), |_, rows, keys, _| {
            let keys = model.rotate_keys(keys)?;
            let head = |x: &[f32], count: usize, from: usize| -> Vec<f32> {
                (0..count).flat_map(|h| (from..604).flat_map(move |t| x[(t * count + h) * 8..][..8].to_vec())).collect()
            };
            (q, k) = (head(rows, v.heads, 300), head(&keys, v.kv_heads, 0));
            Ok(())
        })
        .unwrap();
    let sizes = RepeatInput { q_heads: 4, kv_heads: 2, queries: 304, rows: 300, head_dim: 8, len: 300, ..RepeatInput::default() };
    let expected = score_repeat(&RepeatInput { q: &q, k: &k, ..sizes }).unwrap();
    model
        .repeat_scores(&[], &context, &config(2000), |_, _, scores| {
            scores.iter().zip(&expected).for_each(|(a, e)| assert!((a - e).abs() < 1e-5, "{a} and {e}"));
            Ok(())
        })
        .unwrap();
}

/// v = W_v · hidden.
#[test]
fn hidden_states_are_what_is_projected() {
    for (v, c, _) in families().into_iter().filter(|(v, ..)| !v.qkv_bias) {
        let model = Llama::load(c.folder()).unwrap();
        let tokens = tokens(12, v.vocab);
        let (mut values, mut hidden) = (Vec::new(), Vec::new());
        model
            .capture(&tokens, |_, _, _, v| {
                values.push(v.to_vec());
                Ok(())
            })
            .unwrap();
        model
            .capture_hidden(&tokens, |layer, h| {
                assert_eq!(layer, hidden.len());
                hidden.push(h.to_vec());
                Ok(())
            })
            .unwrap();
        for (layer, (hidden, values)) in hidden.iter().zip(&values).enumerate() {
            assert_eq!(hidden.len(), 12 * v.hidden);
            let weight = model.value_weight(layer).unwrap();
            let rows = weight.len() / v.hidden;
            for (i, value) in values.iter().enumerate() {
                let x = &hidden[i / rows * v.hidden..][..v.hidden];
                let expected: f32 = weight[i % rows * v.hidden..][..v.hidden].iter().zip(x).map(|(w, x)| w * x).sum();
                assert!((value - expected).abs() < 1e-4, "{}, layer {layer}: {value} instead of {expected}", v.name);
            }
        }
        // Those of a context are the same, without the prefix.
        if v.window == 0 {
            let same = |layer: usize, found: &[f32], _: &[f32]| {
                let apart = found.iter().zip(&hidden[layer][2 * v.hidden..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-5, "{}, layer {layer}: {apart} apart", v.name);
                assert_eq!(found.len(), 10 * v.hidden);
                Ok(())
            };
            model.repeat_scores(&tokens[..2], &tokens[2..], &config(7), same).unwrap();
        }
    }
}

#[test]
fn contexts_that_do_not_do_are_named() {
    let v = Variant::llama("x");
    let c = Checkpoint::write(&v);
    let model = Llama::load(c.folder()).unwrap();
    // 64 positions, 6 tokens of a later chunk's prompt at most.
    assert_eq!(model.longest_repeated(1, &config(2000)).unwrap(), 28);
    assert_eq!(model.longest_repeated(1, &config(10)).unwrap(), 47);
    let fails = |prefix: &[u32], n: usize, config: &RepeatConfig| {
        model.repeat_scores(prefix, &tokens(n, v.vocab), config, |_, _, _| Ok(())).unwrap_err().to_string()
    };
    model.repeat_scores(&[0], &tokens(47, v.vocab), &config(10), |_, _, _| Ok(())).unwrap();
    assert!(fails(&[0], 48, &config(10)).contains("a context of 48 tokens: the model can repeat 1 to 47"));
    assert!(fails(&[], 0, &config(10)).contains("a context of 0 tokens"));
    assert!(fails(&[], 5, &config(0)).contains("chunks of 0 tokens"));
    assert!(fails(&[7; 58], 1, &config(1)).contains("no room for a context"));
    assert!(fails(&[99], 5, &config(5)).contains("token 99"));
    let wordy = RepeatConfig { first: "t1 ".repeat(70), ..config(5) };
    assert!(fails(&[], 5, &wordy).contains("no room"), "{}", fails(&[], 5, &wordy));
    let ended =
        model.repeat_scores(&[], &[3, 4, 5], &config(5), |layer, _, _| Err(EngineError::Input(format!("enough of {layer}"))));
    assert_eq!(ended.unwrap_err().to_string(), "enough of 0");
    // A window is all that can be repeated.
    let windowed = Checkpoint::write(&Variant { model_type: "mistral", window: 20, ..v });
    assert_eq!(Llama::load(windowed.folder()).unwrap().longest_repeated(0, &config(2000)).unwrap(), 7);
}
