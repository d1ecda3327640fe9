//! A page of results: for each op the time of each case over its floor, beside peers of the same shape.

mod compare;
mod draw;
mod read;
mod text;

use crate::write_text;
use std::path::{Path, PathBuf};

/// Reads results files (of one op each, or collected), and writes `README.md` and a figure an op into a folder. Gives the
/// names of the ops that were drawn.
///
/// # Errors
/// If a file is not what it should be, or cannot be read or written; names it.
pub fn results_page(files: &[PathBuf], folder: &Path) -> Result<Vec<String>, String> {
    let page = compare::Page::of(read::read(files)?)?;
    for op in &page.ops {
        let path = folder.join(format!("{}.svg", op.name));
        write_text(
            &path,
            &draw::figure(op, page.gpu.as_deref().unwrap_or_default()).map_err(|e| format!("{}: {e}", path.display()))?,
        )?;
    }
    write_text(&folder.join("README.md"), &text::markdown(&page))?;
    Ok(page.ops.iter().map(|op| op.name.clone()).collect())
}

#[cfg(test)]
mod tests;
