//! Which rows an eviction keeps.

use super::cache::EvictingCache;
use super::policy::{Prompt, Scorer, Sharing, Size};
use super::sequence::Sequence;

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Some of a prompt of so many tokens has been appended; all of it, the last time.
    Chunk {
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// The prompt is complete.
    Prompt,
    /// Tokens are being generated.
    Decode,
}

/// What an eviction does.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Task {
    /// Tokens of a prompt are judged once and for all: those at positions `from..to`.
    Judge { from: usize, to: usize, keep: usize, strict: bool, floor: usize },
    /// All rows compete, but sinks and those from a position on.
    Compete { recent_from: usize, keep: Keep },
}

/// How many rows stay where all compete, those that stay in any case among them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Keep {
    /// Of each owner.
    Each(Vec<usize>),
    /// Of an owner on average, `forced` of which stay in any case: layers, or heads of a layer, share them by their scores.
    Shared { tokens: usize, forced: usize },
    /// Of all.
    All { rows: usize, strict: bool, floor: usize },
}

impl EvictingCache {
    /// What there is to do; `None` if nothing goes.
    pub(super) fn task(&self, s: &Sequence, moment: Moment) -> Option<Task> {
        let p = &self.policy;
        match (p.prompt, moment) {
            (Prompt::EachChunk, Moment::Chunk { prompt }) => self.judging(s, prompt),
            (Prompt::EachChunk, Moment::Prompt) => self.judging(s, s.tokens),
            (Prompt::AtEnd, Moment::Prompt) => self.competing(s),
            (_, Moment::Decode) if self.due(s) => self.competing(s),
            _ => None,
        }
    }

    /// Whether rows compete, so many tokens after they did the last time.
    pub(super) fn due(&self, s: &Sequence) -> bool {
        self.policy.decode.is_some_and(|interval| s.tokens >= s.evicted_at + interval)
    }

    /// Fast KVzip (arXiv 2601.17668): of what has left the window and was not judged yet, a share stays such that with the window
    /// it is the share of the prompt that was asked for. Where the window alone is more, the last tokens stay.
    fn judging(&self, s: &Sequence, prompt: usize) -> Option<Task> {
        let p = &self.policy;
        let Size::Share(share) = p.size else { return None };
        let prompt = prompt.max(s.tokens);
        let context = (prompt - p.sinks.min(prompt)) as f64;
        let (mut window, mut rate) = (window(p.recent, context), 0.0);
        if share * context < window as f64 {
            window = (share * context).floor() as usize;
        } else if context > window as f64 {
            rate = (share * context - window as f64) / (context - window as f64);
        }
        let from = s.judged.max(p.sinks);
        let to = (s.tokens.saturating_sub(window)).min(s.committed);
        let Sharing::All { floor, strict } = p.sharing else { return None };
        let judged = self.owners() * to.saturating_sub(from);
        let keep = (judged as f64 * rate) as usize;
        (share < 1.0 && to > from).then_some(Task::Judge { from, to, keep, strict, floor })
    }

    fn competing(&self, s: &Sequence) -> Option<Task> {
        let p = &self.policy;
        // What may be taken back stays.
        let recent_from = s.tokens.saturating_sub(p.recent).min(s.committed);
        let tokens = p.size.of(s.tokens);
        let forced = p.sinks.min(recent_from) + s.tokens - recent_from;
        let owners = s.owners.len();
        let rows: usize = s.owners.iter().map(|o| o.rows).sum();
        let over = |most: usize| s.owners.iter().any(|o| o.rows > most);
        let keep = match p.sharing {
            Sharing::Each if p.is_by_age() => Keep::Each(vec![forced; owners]),
            Sharing::Each => Keep::Each(vec![tokens.max(forced); owners]),
            Sharing::Pyramid { .. } | Sharing::Dynamic { .. } | Sharing::Heads { .. } => Keep::Shared { tokens, forced },
            // Those that stay in any case are the best of their head.
            Sharing::All { floor, strict } => {
                let floor = if floor > 0 { floor + forced } else { 0 };
                Keep::All { rows: tokens.max(forced) * owners, strict, floor }
            }
        };
        let some = match &keep {
            Keep::Each(each) => over(each.iter().copied().min().unwrap_or(0)),
            Keep::Shared { tokens, .. } => rows > tokens.max(&forced) * owners,
            Keep::All { rows: most, .. } => rows > *most,
        };
        some.then_some(Task::Compete { recent_from, keep })
    }
}

/// The last tokens that stay: as many as asked for, 2 % of contexts shorter than 16,000 (fewer if fewer are asked for).
fn window(asked: usize, context: f64) -> usize {
    if context < 16_000.0 { asked.min((0.02 * context).floor() as usize) } else { asked }
}

impl super::Policy {
    fn is_by_age(&self) -> bool {
        matches!(self.scorer, Scorer::Age)
    }
}
