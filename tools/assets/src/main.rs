//! Makes the texts of `assets/` by sampling the bundled model: `cargo run --release -p kvlar-assets [text] [calibration] [needles] [gates]`.
//!
//! * `text.txt`: for perplexity. `calibration.txt`: for fitting; from other seeds, never evaluated on.
//! * `needle-500.jsonl`, `needle-1000.jsonl`: four facts in sampled filler of about so many tokens, and a question for each.
//! * `gates.txt`: for training gates, never evaluated on: `calibration.txt`, then facts in lines of it and lists of made-up pairs,
//!   from other seeds than those of the tasks.
//!
//! Same seeds, same files. The synthetic recall task (`recall-60.jsonl`) came with the model.

use kvlar::Device;
use kvlar_candle::llama::{Llama, Logits, Sampler, Sampling};
use kvlar_candle::{PagedStore, StoreConfig};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::error::Error;
use std::path::Path;

/// Tokens of a document at most; a new one then begins, as after an end-of-text token.
const DOCUMENT: usize = 700;

/// The model also learned lists of made-up names and numbers, which would answer needle questions wrongly.
fn is_prose(text: &str) -> bool {
    let pair = |l: &&str| l.split_once(": ").is_some_and(|(_, n)| n.len() == 3 && n.bytes().all(|b| b.is_ascii_digit()));
    10 * text.lines().filter(pair).count() < text.lines().count() && !text.contains("secret code")
}

/// A document of prose or code, of at least 100 tokens.
fn document(model: &Llama, seed: u64) -> Result<String, Box<dyn Error>> {
    let mut seed = seed * 1000;
    loop {
        let mut sampler = Sampler::new(Sampling::Random { temperature: 1.0, top_p: 1.0, seed })?;
        let mut store = PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::bf16(DOCUMENT + 1))?;
        let first = model.config().bos.ok_or("the model has no first token")?;
        let mut logits = model.prefill(&mut store, &[first], Logits::Last)?;
        let mut tokens = Vec::new();
        while tokens.len() < DOCUMENT {
            let token = sampler.next(&logits)?;
            if model.config().eos.contains(&token) || Some(token) == model.config().bos {
                break;
            }
            tokens.push(token);
            logits = model.extend(&mut store, &[token], Logits::Last)?;
        }
        let text = model.decode(&tokens)?.replace('\u{fffd}', "");
        if tokens.len() >= 100 && is_prose(&text) {
            return Ok(text);
        }
        seed += 1;
    }
}

/// Documents of at least `tokens` tokens together.
fn text(model: &Llama, tokens: usize, mut seed: u64) -> Result<String, Box<dyn Error>> {
    let (mut all, mut count) = (String::new(), 0);
    while count < tokens {
        let d = document(model, seed)?;
        count += model.encode(&d)?.len();
        all += d.trim();
        all += "\n\n";
        seed += 1;
        println!("{count} of {tokens} tokens");
    }
    Ok(all)
}

fn name(rng: &mut StdRng) -> String {
    let syllables = 2 + usize::from(rng.random_bool(0.5));
    let pick = |rng: &mut StdRng, from: &[u8]| char::from(from[rng.random_range(0..from.len())]);
    (0..syllables).flat_map(|_| [pick(rng, b"bcdfgjklmnprstvwz"), pick(rng, b"aeiou")]).collect()
}

/// Contexts of about `tokens` tokens, cut from `filler`, with four facts at random places each.
fn needles(model: &Llama, filler: &str, tokens: usize, contexts: usize, seed: u64) -> Result<String, Box<dyn Error>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let lines: Vec<&str> = filler.lines().collect();
    let mut out = String::new();
    for c in 0..contexts {
        let facts: Vec<(String, String)> =
            (0..4).map(|_| (name(&mut rng), (0..5).map(|_| char::from(b'0' + rng.random_range(0..10u8))).collect())).collect();
        let fact_lines: Vec<String> = facts.iter().map(|(n, code)| format!("The secret code of {n} is {code}.")).collect();
        let budget = tokens.saturating_sub(model.encode(&fact_lines.join("\n"))?.len());
        let (mut chosen, mut count) = (Vec::new(), 0);
        for line in lines.iter().cycle().skip(c * lines.len() / contexts) {
            let n = model.encode(&format!("{line}\n"))?.len();
            if count + n > budget {
                break;
            }
            count += n;
            chosen.push((*line).to_string());
        }
        for fact in fact_lines {
            chosen.insert(rng.random_range(0..=chosen.len()), fact);
        }
        let questions: Vec<_> = facts
            .iter()
            .map(|(n, code)| serde_json::json!({"question": format!("\nQuestion: What is the secret code of {n}?\nAnswer:"), "answer": format!(" {code}")}))
            .collect();
        out += &serde_json::json!({"context": chosen.join("\n"), "questions": questions}).to_string();
        out.push('\n');
    }
    Ok(out)
}

/// Parts of two kinds, as the model was trained to recall: lists of made-up pairs, and four facts in lines of `filler`.
fn recallable(filler: &str, parts: usize, seed: u64) -> String {
    let mut rng = StdRng::seed_from_u64(seed);
    let lines: Vec<&str> = filler.lines().collect();
    let mut all = String::new();
    for _ in 0..parts {
        if rng.random_bool(0.5) {
            for _ in 0..rng.random_range(20..90) {
                all += &format!("{}: {:03}\n", name(&mut rng), rng.random_range(0..1000));
            }
        } else {
            let (first, count) = (rng.random_range(0..lines.len()), rng.random_range(20..60));
            let mut chosen: Vec<String> = lines.iter().cycle().skip(first).take(count).map(|l| (*l).to_string()).collect();
            for _ in 0..4 {
                let fact = format!("The secret code of {} is {:05}.", name(&mut rng), rng.random_range(0..100_000));
                chosen.insert(rng.random_range(0..=chosen.len()), fact);
            }
            all += &(chosen.join("\n") + "\n");
        }
        all += "\n";
    }
    all
}

fn main() -> Result<(), Box<dyn Error>> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets");
    let model = Llama::load(assets.join("tiny-llama"))?;
    // Without arguments everything is made; else what is named.
    let named: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| n == name);
    if wanted("text") {
        std::fs::write(assets.join("text.txt"), text(&model, 10_000, 1)?)?;
    }
    if wanted("calibration") {
        std::fs::write(assets.join("calibration.txt"), text(&model, 12_000, 1_000)?)?;
    }
    if wanted("gates") {
        let filler = std::fs::read_to_string(assets.join("calibration.txt"))?;
        let text = filler.trim_end().to_string() + "\n\n" + &recallable(&filler, 30, 3_000);
        std::fs::write(assets.join("gates.txt"), text)?;
    }
    if wanted("needles") {
        let filler = text(&model, 5_000, 2_000)?;
        std::fs::write(assets.join("needle-500.jsonl"), needles(&model, &filler, 500, 16, 1)?)?;
        std::fs::write(assets.join("needle-1000.jsonl"), needles(&model, &filler, 1000, 12, 2)?)?;
    }
    Ok(())
}
