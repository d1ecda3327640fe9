//! What the gate of one layer is taught.

use crate::error::{Result, config, finite, shape};
use half::bf16;

/// Hidden states of tokens and the scores that a gate should give them, of one layer.
///
/// Hidden states are kept in bf16, as gates meet them: 2·D + 4·H bytes a token.
#[derive(Clone, Debug)]
pub struct GateSample {
    hidden_dim: usize,
    kv_heads: usize,
    group: usize,
    hidden: Vec<bf16>,
    /// Token after token.
    targets: Vec<f32>,
}

impl GateSample {
    /// Of no tokens yet: hidden states of `hidden` numbers, `group` query heads a kv head.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a size of 0.
    pub fn new(hidden: usize, kv_heads: usize, group: usize) -> Result<Self> {
        if hidden == 0 || kv_heads == 0 || group == 0 {
            return config("sample", format!("{kv_heads} kv heads of {group} query heads, hidden states of {hidden} numbers"));
        }
        Ok(Self { hidden_dim: hidden, kv_heads, group, hidden: Vec::new(), targets: Vec::new() })
    }

    /// Adds T tokens: hidden states [T, D], scores [H, T] as `score_repeat` gives them.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for sizes that do not fit together,
    /// [`Error::NotFinite`](crate::Error::NotFinite) for NaN and infinities, [`Error::Config`](crate::Error::Config) for
    /// scores outside 0 to 1; nothing is added then.
    pub fn add(&mut self, hidden: &[f32], scores: &[f32]) -> Result<()> {
        let (d, h) = (self.hidden_dim, self.kv_heads);
        let tokens = hidden.len() / d;
        shape("hidden", "[T, D]", tokens * d, hidden.len())?;
        shape("scores", "[H, T]", h * tokens, scores.len())?;
        finite("hidden", hidden, d)?;
        finite("scores", scores, tokens)?;
        if let Some(bad) = scores.iter().find(|s| !(0.0..=1.0).contains(*s)) {
            return config("scores", format!("{bad} is no attention weight: they are between 0 and 1"));
        }
        // A finite number beyond the largest of bf16 becomes that.
        let rounded = |x: &f32| bf16::from_f32(*x).clamp(bf16::MIN, bf16::MAX);
        self.hidden.extend(hidden.iter().map(rounded));
        for t in 0..tokens {
            self.targets.extend((0..h).map(|head| scores[head * tokens + t]));
        }
        Ok(())
    }

    /// Tokens added.
    pub fn len(&self) -> usize {
        self.targets.len() / self.kv_heads
    }

    /// Whether none were.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// D, H and G.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.hidden_dim, self.kv_heads, self.group)
    }

    /// Hidden states [n, D] and targets [n, H] of some tokens.
    pub(super) fn gather(&self, tokens: &[usize], hidden: &mut Vec<f32>, targets: &mut Vec<f32>) {
        hidden.clear();
        targets.clear();
        for &t in tokens {
            hidden.extend(self.hidden[t * self.hidden_dim..][..self.hidden_dim].iter().map(|x| x.to_f32()));
            targets.extend_from_slice(&self.targets[t * self.kv_heads..][..self.kv_heads]);
        }
    }
}
