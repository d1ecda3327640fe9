//! What files of plans and of gates have in common.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Shape and little-endian bytes by name.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// SHA-256, in hexadecimal, of a description and of every tensor's name, shape and bytes.
pub(crate) fn hash(text: &str, tensors: &Tensors) -> String {
    let mut sha = Sha256::new();
    let mut field = |bytes: &[u8]| {
        // Lengths keep one field from running into the next.
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    };
    field(text.as_bytes());
    for (name, (shape, bytes)) in tensors {
        field(name.as_bytes());
        shape.iter().for_each(|n| field(&(*n as u64).to_le_bytes()));
        field(bytes);
    }
    sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes a file whole or not at all.
pub(crate) fn whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |path: &Path, source| Error::File { path: path.into(), source };
    let Some(name) = path.file_name() else {
        return Err(failed(path, std::io::Error::other("not the name of a file")));
    };
    let mut part = name.to_os_string();
    part.push(format!(".{}.part", std::process::id()));
    let part: PathBuf = path.with_file_name(part);
    let written = std::fs::File::create(&part).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&part, path)
    });
    written.map_err(|e| {
        let _ = std::fs::remove_file(&part);
        failed(path, e)
    })
}
