//! Caches whose heads hold rows of their own.

mod choice;
pub mod lab;
mod lives;
mod policies;
mod steps;
