//! A checkpoint's folder: files, tensors, errors that name them.

use crate::{EngineError, Result};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Reads a text file.
pub fn read(path: &Path, why: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => EngineError::MissingFile { path: path.into(), why: why.into() },
        _ => EngineError::BadFile { path: path.into(), problem: e.to_string() },
    })
}

/// The weights: one safetensors file, or those that an index names.
pub struct Weights {
    folder: PathBuf,
    files: MmapedSafetensors,
    device: Device,
}

impl Weights {
    pub fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        let paths = if index.exists() { indexed(folder, &index)? } else { vec![single] };
        for path in &paths {
            check(path)?;
        }
        // SAFETY: the files are mapped; changing them while the program runs is undefined, as for any mapped file.
        let files = unsafe { MmapedSafetensors::multi(&paths) }
            .map_err(|e| EngineError::BadFile { path: folder.into(), problem: e.to_string() })?;
        Ok(Self { folder: folder.into(), files, device: Device::Cpu })
    }

    /// A tensor in f32, of this shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let view =
            self.files.get(name).map_err(|_| EngineError::MissingTensor { path: self.folder.clone(), name: name.into() })?;
        if view.shape() != shape {
            let (found, expected) = (view.shape().to_vec(), shape.to_vec());
            return Err(EngineError::BadTensor { path: self.folder.clone(), name: name.into(), found, expected });
        }
        Ok(self.files.load(name, &self.device)?.to_dtype(DType::F32)?)
    }
}

/// The files that an index names.
fn indexed(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let bad = |problem: String| EngineError::BadFile { path: index.into(), problem };
    let value: Value = serde_json::from_str(&read(index, "the index of the weights")?).map_err(|e| bad(e.to_string()))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no weight_map".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("the file of {tensor:?} is not a name")))?;
        if Path::new(file).components().count() != 1 {
            return Err(bad(format!("{file:?} is not a file of the folder")));
        }
        names.insert(file);
    }
    Ok(names.into_iter().map(|n| folder.join(n)).collect())
}

/// That a file is there and whole: its header must cover it exactly.
fn check(path: &Path) -> Result<()> {
    let bad = |problem: String| EngineError::BadFile { path: path.into(), problem };
    if !path.exists() {
        return Err(EngineError::MissingFile { path: path.into(), why: "the weights".into() });
    }
    // SAFETY: as in `Weights::open`; the map ends with this function.
    unsafe { MmapedSafetensors::new(path) }.map(|_| ()).map_err(|e| bad(format!("not a whole safetensors file: {e}")))
}
