//! Where the bundled model and texts are.

use anyhow::{Result, bail};
use std::path::PathBuf;

/// `KVLAR_ASSETS`, else `assets` in the working folder or above the program (as in `target/release`).
pub fn folder() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("KVLAR_ASSETS") {
        return Ok(dir.into());
    }
    let program = std::env::current_exe().unwrap_or_default();
    let mut places = vec![PathBuf::from("assets")];
    places.extend(program.ancestors().map(|p| p.join("assets")));
    match places.into_iter().find(|p| p.join("tiny-llama/config.json").exists()) {
        Some(dir) => Ok(dir),
        None => bail!("no folder `assets` here or above the program: run from the repository, or set KVLAR_ASSETS"),
    }
}
