//! Reading cases and writing results.

use super::{OpError, Result, input};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::str::FromStr;

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Tensors and scalars of a file. What an op asks for is taken out; what is left at the end is unknown.
pub struct Case {
    tensors: BTreeMap<String, Stored>,
    scalars: BTreeMap<String, String>,
}

/// A float tensor.
pub struct Floats {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Case {
    /// Reads a file; `set` are key=value pairs that win over its metadata.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        let name = path.display();
        let bytes = std::fs::read(path).map_err(|e| OpError::Input(format!("{name}: {e}")))?;
        let bad = |e: safetensors::SafeTensorError| OpError::Input(format!("{name}: not a safetensors file: {e}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(bad)?;
        let file = SafeTensors::deserialize(&bytes).map_err(bad)?;
        let mut scalars: BTreeMap<String, String> = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
        for pair in set {
            let Some((key, value)) = pair.split_once('=') else { return input(format!("--set {pair:?} is not key=value")) };
            scalars.insert(key.into(), value.into());
        }
        scalars.remove("format"); // tools add it
        let stored = |t: TensorView<'_>| Stored { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
        let tensors = file.tensors().into_iter().map(|(n, t)| (n, stored(t))).collect();
        Ok(Self { tensors, scalars })
    }

    /// A scalar, or its default.
    pub fn scalar<T: FromStr>(&mut self, key: &str, default: T) -> Result<T> {
        match self.scalars.remove(key) {
            None => Ok(default),
            Some(text) => text.trim().parse().or_else(|_| input(format!("{key}: {text:?} is not a value it can have"))),
        }
    }

    /// A scalar as text.
    pub fn text(&mut self, key: &str) -> Option<String> {
        self.scalars.remove(key)
    }

    /// One of some words; the first is the default.
    pub fn choice<T: Copy>(&mut self, key: &str, from: &[(&str, T)]) -> Result<T> {
        let Some(text) = self.scalars.remove(key) else { return Ok(from[0].1) };
        match from.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => Ok(*value),
            None => input(format!("{key}: {text:?} is none of {}", from.iter().map(|f| f.0).collect::<Vec<_>>().join(", "))),
        }
    }

    /// `dtype`: what q, k and v are rounded to.
    pub fn dtype(&mut self) -> Result<kvlar::Dtype> {
        self.choice("dtype", &[("bf16", kvlar::Dtype::Bf16), ("f16", kvlar::Dtype::F16), ("f32", kvlar::Dtype::F32)])
    }

    /// An optional float tensor, as f32.
    pub fn floats_if_any(&mut self, name: &str) -> Result<Option<Floats>> {
        let Some(t) = self.tensors.remove(name) else { return Ok(None) };
        let values = match t.dtype {
            Dtype::F32 => t.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => t.bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => t.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => return input(format!("{name} is {other:?}; it must be F32, F16 or BF16")),
        };
        Ok(Some(Floats { shape: t.shape, values }))
    }

    /// The shape of a tensor that has not been taken yet.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    /// A float tensor of some rank.
    pub fn floats(&mut self, name: &str, rank: usize) -> Result<Floats> {
        match self.floats_if_any(name)? {
            None => input(format!("no tensor {name}")),
            Some(t) if t.shape.len() != rank => input(format!("{name} is {:?}; it must have {rank} dimensions", t.shape)),
            Some(t) => Ok(t),
        }
    }

    /// An optional i32 tensor of one of some shapes.
    pub fn ints(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Option<Vec<i32>>> {
        let Some(t) = self.tensors.remove(name) else { return Ok(None) };
        if t.dtype != Dtype::I32 {
            return input(format!("{name} is {:?}; it must be I32", t.dtype));
        }
        if !shapes.iter().any(|s| **s == *t.shape) {
            return input(format!(
                "{name} is {:?}; it must be {}",
                t.shape,
                shapes.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" or ")
            ));
        }
        Ok(Some(t.bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }

    /// An i32 tensor of some rank: its shape and values.
    pub fn ints_of(&mut self, name: &str, rank: usize) -> Result<(Vec<usize>, Vec<i32>)> {
        let shape = match self.tensors.get(name) {
            None => return input(format!("no tensor {name}")),
            Some(t) if t.shape.len() != rank => {
                return input(format!("{name} is {:?}; it must have {rank} dimensions", t.shape));
            }
            Some(t) => t.shape.clone(),
        };
        let values = self.ints(name, &[&shape])?.unwrap_or_default();
        Ok((shape, values))
    }

    /// A u8 tensor of some shape.
    pub fn bytes(&mut self, name: &str, shape: &[usize]) -> Result<Vec<u8>> {
        match self.tensors.remove(name) {
            None => input(format!("no tensor {name}")),
            Some(t) if t.dtype != Dtype::U8 => input(format!("{name} is {:?}; it must be U8", t.dtype)),
            Some(t) => expect(name, &t.shape, shape).map(|()| t.bytes),
        }
    }

    /// Refuses what no one asked for.
    pub fn finish(&self) -> Result<()> {
        if let Some(key) = self.scalars.keys().next() {
            return input(format!("unknown key {key:?}"));
        }
        if let Some(name) = self.tensors.keys().next() {
            return input(format!("unknown tensor {name:?}"));
        }
        Ok(())
    }
}

/// Refuses a tensor of another shape.
pub fn expect(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected { Ok(()) } else { input(format!("{name} is {found:?}; the other tensors make it {expected:?}")) }
}

/// A finite scalar, also as the f32 that a device gets, so that every backend takes the same.
pub fn finite(key: &str, x: f64) -> Result<f64> {
    if (x as f32).is_finite() { Ok(x) } else { input(format!("{key}: {x} is not finite, or beyond f32")) }
}

/// Result tensors.
#[derive(Default)]
pub struct Output(Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>);

impl Output {
    pub fn floats(mut self, name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        self.0.push((name, Dtype::F32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        self
    }

    pub fn ints(mut self, name: &'static str, shape: &[usize], values: &[i32]) -> Self {
        self.0.push((name, Dtype::I32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        self
    }

    pub fn bytes(mut self, name: &'static str, shape: &[usize], values: Vec<u8>) -> Self {
        self.0.push((name, Dtype::U8, shape.to_vec(), values));
        self
    }

    pub fn integer(mut self, name: &'static str, value: i64) -> Self {
        self.0.push((name, Dtype::I64, Vec::new(), value.to_le_bytes().to_vec()));
        self
    }

    /// Writes beside the file, then renames: it appears whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let other = |e: String| OpError::Other(format!("{}: {e}", path.display()));
        let mut views = Vec::new();
        for (name, dtype, shape, bytes) in &self.0 {
            views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| other(e.to_string()))?));
        }
        let metadata: Option<HashMap<String, String>> = None;
        let bytes = safetensors::serialize(views, metadata).map_err(|e| other(e.to_string()))?;
        let part = path.with_extension("part");
        std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path)).map_err(|e| {
            let _ = std::fs::remove_file(&part);
            other(e.to_string())
        })
    }
}
