//! Rows to fit codebooks to, out of more than memory holds.

use crate::error::{Result, config, finite, shape};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Rows of one layer's keys: at most so many, each of those added as likely to be kept as any other (reservoir sampling,
/// Vitter 1985, algorithm R). The same rows in the same order give the same sample.
#[derive(Debug)]
pub struct KeySample {
    heads: usize,
    dim: usize,
    most: usize,
    seen: u64,
    rows: Vec<f32>,
    rng: StdRng,
}

impl KeySample {
    /// Of no rows yet; it will hold `most` of them, 4 · most · heads · dim bytes. `layer` tells the choices of layers apart.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a size of 0.
    pub fn new(heads: usize, dim: usize, most: usize, seed: u64, layer: usize) -> Result<Self> {
        if heads == 0 || dim == 0 || most == 0 {
            return config("sample", format!("{most} rows of {heads} heads of {dim} dimensions: there is nothing to keep"));
        }
        let mut key = [0u8; 32];
        let parts = [seed, layer as u64, u64::MAX];
        parts.iter().zip(key.chunks_exact_mut(8)).for_each(|(part, bytes)| bytes.copy_from_slice(&part.to_le_bytes()));
        Ok(Self { heads, dim, most, seen: 0, rows: Vec::new(), rng: StdRng::from_seed(key) })
    }

    /// Adds keys `k` [n, heads, dim] as they are cached: after RoPE. Codes are scored by table look-ups that know no
    /// position, so what they stand for must be rotated already; and rotation moves keys of one content about, which
    /// codebooks have to cover.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a part of a row, [`Error::NotFinite`](crate::Error::NotFinite) for NaN and
    /// infinities; nothing is added then.
    pub fn add(&mut self, k: &[f32]) -> Result<()> {
        let width = self.heads * self.dim;
        shape("k", "[n, heads, dim]", k.len() / width * width, k.len())?;
        finite("k", k, width)?;
        for row in k.chunks_exact(width) {
            self.seen += 1;
            if self.len() < self.most {
                self.rows.extend_from_slice(row);
                continue;
            }
            let place = self.rng.random_range(0..self.seen);
            if place < self.most as u64 {
                self.rows[place as usize * width..][..width].copy_from_slice(row);
            }
        }
        Ok(())
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        self.rows.len() / (self.heads * self.dim)
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows added.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The rows held, [n, heads, dim].
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Kv heads, and dimensions of each.
    pub fn shape(&self) -> (usize, usize) {
        (self.heads, self.dim)
    }
}
