//! Caches whose heads hold rows of their own.

mod choice;
mod lab;
mod lives;
mod policies;
mod steps;
