//! What a cache costs in quality. The protocol: the context is prefilled exactly and kept by the store; only then come
//! the question's tokens, which see what the store kept; every question starts from the same kept context.

use super::{Llama, Logits};
use crate::store::most_at_once;
use crate::{EngineError, KvStore, Result};
use candle_core::{D, Tensor};
use serde::Deserialize;

/// A context and questions about it, one line of a `.jsonl` file.
#[derive(Clone, Debug, Deserialize)]
pub struct RecallTask {
    /// What is prefilled and kept.
    pub context: String,
    /// What is asked afterwards.
    pub questions: Vec<Question>,
}

/// A question and its only right answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Question {
    /// Follows the context.
    pub question: String,
    /// Follows the question.
    pub answer: String,
}

impl RecallTask {
    /// Parses the lines of a file.
    ///
    /// # Errors
    /// [`EngineError::Input`] that names the line.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        let line =
            |(i, l): (usize, &str)| serde_json::from_str(l).map_err(|e| EngineError::Input(format!("line {}: {e}", i + 1)));
        text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect()
    }
}

/// Questions asked, and recalled: every token of the answer is the likeliest (teacher-forced).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recall {
    /// Asked.
    pub questions: usize,
    /// Recalled.
    pub recalled: usize,
}

/// Tokens that [`recall`] runs after a context for its longest question: what its store must be able to take back.
///
/// # Errors
/// What the tokenizer refuses.
pub fn longest_question(model: &Llama, task: &RecallTask) -> Result<usize> {
    let inputs = task.questions.iter().map(|q| Ok(input(model, q)?.0.len()));
    inputs.collect::<Result<Vec<_>>>().map(|n| n.into_iter().max().unwrap_or(0))
}

/// A question and all of its answer but the last token, and the answer.
fn input(model: &Llama, q: &Question) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut input, answer) = (model.encode(&q.question)?, model.encode(&q.answer)?);
    input.extend(answer.split_last().map_or(&[][..], |(_, before)| before));
    Ok((input, answer))
}

/// Asks the questions of one context. The store must be empty, and holds the context afterwards.
///
/// # Errors
/// [`EngineError::Input`] for a question that is longer than what the store takes back without a trace
/// ([`KvStore::rollback`], [`longest_question`]); what the model or the store refuses.
pub fn recall(model: &Llama, store: &mut dyn KvStore, task: &RecallTask) -> Result<Recall> {
    let context = model.prompt(&task.context)?;
    model.prefill(store, &context, Logits::Last)?;
    let mut result = Recall::default();
    for q in &task.questions {
        let (input, answer) = input(model, q)?;
        // The logits of the question's last token are those of the answer's first.
        let (false, Some(first)) = (answer.is_empty(), input.len().checked_sub(answer.len())) else { continue };
        if input.len() > store.rollback() {
            let (n, most) = (input.len(), store.rollback());
            return Err(EngineError::Input(format!(
                "a question of {n} tokens, of which the store takes back {most}: make it with rollback_rows of {n} or more"
            )));
        }
        let logits = model.extend(store, &input, Logits::All)?;
        let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        result.questions += 1;
        result.recalled += usize::from(best[first..] == answer[..]);
        store.truncate(context.len())?;
    }
    Ok(result)
}

/// Tokens that run at once, where a store takes as many.
pub(super) const CHUNK: usize = 64;

/// Sum of −ln p over the second half of `tokens`, and how many those are: the first half is prefilled, the second sees
/// what the store keeps. The store must be empty.
///
/// # Errors
/// What the model or the store refuses; [`EngineError::Input`] for fewer than two tokens.
pub fn perplexity(model: &Llama, store: &mut dyn KvStore, tokens: &[u32]) -> Result<(f64, usize)> {
    let half = tokens.len() / 2;
    if half == 0 {
        return Err(EngineError::Input("perplexity needs two tokens".into()));
    }
    let (context, rest) = tokens.split_at(half);
    let mut nll = 0.0;
    let mut logits = model.prefill(store, context, Logits::Last)?;
    for chunk in rest.chunks(CHUNK.min(most_at_once(store))) {
        // The logits before each token of the chunk.
        let next = model.extend(store, chunk, Logits::All)?;
        let before = Tensor::cat(&[&logits, &next.narrow(0, 0, chunk.len() - 1)?], 0)?;
        let log_p = candle_nn::ops::log_softmax(&before, D::Minus1)?;
        let ids = Tensor::new(chunk, before.device())?.unsqueeze(1)?;
        nll -= f64::from(log_p.gather(&ids, 1)?.sum_all()?.to_scalar::<f32>()?);
        logits = next.narrow(0, chunk.len() - 1, 1)?;
    }
    Ok((nll, rest.len()))
}
