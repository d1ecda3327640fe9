//! Projection of rows to latents, and what appending latents shares with it.

mod division;
mod groups;
mod plan;

pub(crate) use division::Division;
pub use groups::HeadGroups;
pub use plan::{ProjectPlan, ProjectShape, Projection};
pub(crate) use plan::{check_projection, variant};

/// Highest rank that kernels have.
pub(crate) const MAX_RANK: usize = 4096;

#[cfg(test)]
mod tests;
