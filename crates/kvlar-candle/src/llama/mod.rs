//! An engine for Hugging Face checkpoints of the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3.
//!
//! Dense arithmetic is candle's, on the CPU in f32; attention of decoding and the cache are kvlar's.

mod attention_error;
mod capture;
mod checkpoint;
mod config;
mod evaluate;
mod fisher;
mod generate;
mod model;
mod repeat;

pub use attention_error::{AttentionError, LayerError, attention_error};
pub use config::{Config, Family};
pub use evaluate::{Protocol, Question, Recall, RecallTask, end_of_prompt, longest_question, perplexity, recall};
pub use fisher::{Fisher, Gradients};
pub use generate::{Sampler, Sampling, generate};
pub use model::{Llama, Logits};
pub use repeat::RepeatConfig;
