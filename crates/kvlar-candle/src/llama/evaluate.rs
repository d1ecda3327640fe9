//! What a cache costs in quality. The context is prefilled exactly and kept by the store; then come the question's tokens. What
//! the store lets go of, it lets go of before the question is seen, or after it ([`Protocol`]); every question starts from the
//! same context.

use super::{Llama, Logits, RepeatConfig};
use crate::store::most_at_once;
use crate::{EngineError, KvStore, Moment, Result};
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

/// When a store that evicts does it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// Once the context is read, before any question is seen: one cache for all questions.
    #[default]
    Context,
    /// Once the question is read too, which is in the window that SnapKV and DynamicKV score by: a cache for each question.
    Question,
}

/// Questions asked, and recalled: every token of the answer is the likeliest (teacher-forced).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recall {
    /// Asked.
    pub questions: usize,
    /// Recalled.
    pub recalled: usize,
    /// Bytes a token of what the questions' answers saw: of the context, or (the mean) of the context with a question.
    pub bytes_per_token: f64,
}

/// Tokens of a chunk that KVzip's scores make the model repeat at a time.
const REPEATED: usize = 512;

/// A prompt is complete: a store that evicts lets go of some of it. KVzip's scores take forward passes, which repeat it.
///
/// # Errors
/// What the model or the store refuses.
pub fn end_of_prompt(model: &Llama, store: &mut dyn KvStore, tokens: &[u32]) -> Result<()> {
    if store.wants_scores() {
        let prefix = usize::from(tokens.first().is_some_and(|t| model.config().bos == Some(*t)));
        let config = RepeatConfig { chunk: REPEATED, ..RepeatConfig::default() };
        model.repeat_scores(&tokens[..prefix], &tokens[prefix..], &config, |layer, _, scores| {
            // The prefix is as dear as can be.
            let heads = scores.chunks_exact(tokens.len() - prefix);
            let all: Vec<f32> = heads.flat_map(|h| std::iter::repeat_n(1.0, prefix).chain(h.iter().copied())).collect();
            store.give_scores(layer, &all)
        })?;
    }
    store.evict(Moment::Prompt)
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
pub fn recall(model: &Llama, store: &mut dyn KvStore, task: &RecallTask, protocol: Protocol) -> Result<Recall> {
    let context = model.prompt(&task.context)?;
    model.prefill(store, &context, Logits::Last)?;
    if protocol == Protocol::Context {
        end_of_prompt(model, store, &context)?;
    }
    let mark = store.mark()?;
    let mut result = Recall { bytes_per_token: store.bytes() as f64 / context.len() as f64, ..Recall::default() };
    let mut bytes = Vec::new();
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
        let logits = match protocol {
            Protocol::Context => model.extend(store, &input, Logits::All)?,
            Protocol::Question => {
                let (question, rest) = input.split_at(first + 1);
                let asked = model.extend_prompt(store, question, Logits::All)?;
                end_of_prompt(model, store, &[&context[..], question].concat())?;
                bytes.push(store.bytes() as f64 / store.len() as f64);
                match rest {
                    [] => asked,
                    rest => Tensor::cat(&[&asked, &model.extend(store, rest, Logits::All)?], 0)?,
                }
            }
        };
        let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        result.questions += 1;
        result.recalled += usize::from(best[first..] == answer[..]);
        store.return_to(mark)?;
    }
    if !bytes.is_empty() {
        result.bytes_per_token = bytes.iter().sum::<f64>() / bytes.len() as f64;
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
    end_of_prompt(model, store, context)?;
    for chunk in rest.chunks(CHUNK.min(most_at_once(store))) {
        // The logits before each token of the chunk.
        let next = model.extend(store, chunk, Logits::All)?;
        let before = Tensor::cat(&[&logits, &next.narrow(0, 0, chunk.len() - 1)?], 0)?;
        let log_p = candle_nn::ops::log_softmax(&before, D::Minus1)?;
        let ids = Tensor::new(chunk, before.device())?.unsqueeze(1)?;
        nll -= f64::from(log_p.gather(&ids, 1)?.sum_all()?.to_scalar::<f32>()?);
        logits = next.narrow(0, chunk.len() - 1, 1)?;
        store.evict(Moment::Decode)?;
    }
    Ok((nll, rest.len()))
}
