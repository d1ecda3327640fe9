//! Plan files: safetensors, all else as JSON in the metadata key `kvlar.plan`.
//!
//! `kvlar.plan` is `{"format": version, "sha256": hash, "plan": text}`; `text` is JSON too, kept as text because the hash
//! covers it letter by letter, with the name, shape and bytes of every tensor.

use super::check::{layout, problem};
use super::{Factors, FitConfig, LayerPlan, PLAN_FORMAT, Plan, Quantized, Side, SideHeader};
use crate::config::{RecalkvConfig, check_multiple};
use crate::error::{Error, Result};
use crate::file::{Tensors, hash, whole};
use crate::shape::ModelShape;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

const KEY: &str = "kvlar.plan";
/// The oldest version that is read: plans of ReCalKV, whose settings are not named after it.
const OLDEST: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    sha256: String,
    plan: String,
}

/// Read first, so that an unknown version is named whatever else it holds.
#[derive(Deserialize)]
struct AnyVersion {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Header<C> {
    method: String,
    fingerprint: String,
    model: ModelShape,
    config: C,
    sink_rows: usize,
    recent_rows: usize,
    layers: Vec<LayerHeader>,
}

#[derive(Serialize, Deserialize)]
struct LayerHeader {
    keys: SideHeader,
    values: SideHeader,
}

impl Plan {
    /// Writes the plan: beside the file, then renamed, so that the file is there whole or not at all. The same plan gives
    /// the same bytes.
    ///
    /// # Errors
    /// [`Error::Plan`] if the plan does not fit together, [`Error::File`] if writing fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(p) = problem(self) {
            return bad(path, p);
        }
        let mut tensors = Tensors::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        let shape = self.model.layer;
        for (l, layer) in self.layers.iter().enumerate() {
            let mut side =
                |name: &str, side: &Side, dim: usize| put(&mut tensors, &format!("layers.{l}.{name}"), side, shape.kv_heads, dim);
            layers.push(LayerHeader {
                keys: side("keys", &layer.keys, shape.head_dim),
                values: side("values", &layer.values, shape.value_dim),
            });
        }
        let header = Header {
            method: self.method.clone(),
            fingerprint: self.fingerprint.clone(),
            model: self.model,
            config: &self.config,
            sink_rows: self.sink_rows,
            recent_rows: self.recent_rows,
            layers,
        };
        let json = |e: serde_json::Error| Error::Plan { path: path.into(), problem: e.to_string() };
        let text = serde_json::to_string(&header).map_err(json)?;
        let envelope = Envelope { format: self.format, sha256: hash(&text, &tensors), plan: text };
        let metadata = HashMap::from([(KEY.to_string(), serde_json::to_string(&envelope).map_err(json)?)]);
        let safe = |e: safetensors::SafeTensorError| Error::Plan { path: path.into(), problem: e.to_string() };
        let mut views = Vec::with_capacity(tensors.len());
        for (name, (shape, bytes)) in &tensors {
            views.push((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(safe)?));
        }
        whole(path, &safetensors::serialize(views, Some(metadata)).map_err(safe)?)
    }

    /// Reads a plan, of this version or of one before it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::Version`] for another version, [`Error::Plan`] for anything that is
    /// not a whole, sound plan: not a plan file, bytes changed since it was written, tensors missing, misshapen or not
    /// finite, groups that do not partition the heads, ranks above size × dim, formats that such rows cannot have.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::File { path: path.into(), source })?;
        let Ok((_, metadata)) = SafeTensors::read_metadata(&bytes) else {
            return bad(path, "not a safetensors file, or cut off; fit the plan again");
        };
        let Some(envelope) = metadata.metadata().as_ref().and_then(|m| m.get(KEY)) else {
            return bad(path, format!("not a plan: its metadata has no {KEY}; `kvlar calibrate` writes plans"));
        };
        let unreadable = |what: &str, e: serde_json::Error| Error::Plan { path: path.into(), problem: format!("{what}: {e}") };
        let version: AnyVersion = serde_json::from_str(envelope).map_err(|e| unreadable("its format version", e))?;
        if !(OLDEST..=PLAN_FORMAT).contains(&version.format) {
            return Err(Error::Version { path: path.into(), found: version.format, known: PLAN_FORMAT });
        }
        let envelope: Envelope = serde_json::from_str(envelope).map_err(|e| unreadable("its metadata", e))?;
        let Ok(file) = SafeTensors::deserialize(&bytes) else {
            return bad(path, "cut off or damaged: its tensors do not fill the file; fit the plan again");
        };
        let mut tensors = Tensors::new();
        for (name, t) in file.tensors() {
            if t.dtype() != Dtype::F32 {
                return bad(path, format!("tensor {name} is {:?} instead of F32", t.dtype()));
            }
            tensors.insert(name, (t.shape().to_vec(), t.data().to_vec()));
        }
        if hash(&envelope.plan, &tensors) != envelope.sha256 {
            return bad(path, "its bytes are not those that were written (hash mismatch); fit the plan again");
        }
        let described = |e| unreadable("its description", e);
        let plan = match version.format {
            OLDEST => assemble::<RecalkvConfig>(serde_json::from_str(&envelope.plan).map_err(described)?, tensors),
            _ => assemble::<FitConfig>(serde_json::from_str(&envelope.plan).map_err(described)?, tensors),
        };
        let plan = plan.map_err(|problem| Error::Plan { path: path.into(), problem })?;
        match problem(&plan) {
            Some(p) => bad(path, p),
            None => Ok(plan),
        }
    }
}

fn bad<T>(path: &Path, problem: impl Into<String>) -> Result<T> {
    Err(Error::Plan { path: path.into(), problem: problem.into() })
}

fn put(tensors: &mut Tensors, prefix: &str, side: &Side, kv_heads: usize, dim: usize) -> SideHeader {
    let mut insert = |name: &str, shape: &[usize], values: &[f32]| {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.insert(format!("{prefix}.{name}"), (shape.to_vec(), bytes));
    };
    let f = match side {
        Side::Dense => return SideHeader::Dense,
        Side::LowRank(f) => f,
        Side::Quantized(q) => {
            if let (Some(shape), Some(values)) = (q.format.codebooks(kv_heads, dim), &q.codebooks) {
                insert("codebooks", &shape, values);
            }
            return SideHeader::Quantized(q.format);
        }
    };
    let (heads, dim, rank) = (f.heads(), f.dim(), f.rank);
    insert("basis", &[heads, dim, rank], &f.basis);
    insert("encoder", &[f.groups.len(), rank, heads / f.groups.len() * dim], &f.encoder);
    if let Some(mean) = &f.mean {
        insert("mean", &[heads, dim], mean);
    }
    SideHeader::LowRank { groups: f.groups.clone(), rank, latent: f.latent, mean: f.mean.is_some() }
}

fn assemble<C: Into<FitConfig>>(header: Header<C>, mut tensors: Tensors) -> std::result::Result<Plan, String> {
    let config: FitConfig = header.config.into();
    let (shape, multiple) = (header.model.layer, config.multiple());
    header.model.checked().and_then(|_| check_multiple(multiple)).map_err(|e| e.to_string())?;
    let mut layers = Vec::with_capacity(header.layers.len());
    for (l, layer) in header.layers.into_iter().enumerate() {
        let mut side = |name: &str, side: SideHeader, dim: usize| {
            take(&mut tensors, &format!("layers.{l}.{name}"), side, shape.kv_heads, dim, multiple)
        };
        layers.push(LayerPlan {
            keys: side("keys", layer.keys, shape.head_dim)?,
            values: side("values", layer.values, shape.value_dim)?,
        });
    }
    if let Some(name) = tensors.keys().next() {
        return Err(format!("tensor {name} belongs to no layer"));
    }
    Ok(Plan {
        format: PLAN_FORMAT,
        method: header.method,
        fingerprint: header.fingerprint,
        model: header.model,
        config,
        sink_rows: header.sink_rows,
        recent_rows: header.recent_rows,
        layers,
    })
}

fn take(
    tensors: &mut Tensors,
    prefix: &str,
    header: SideHeader,
    heads: usize,
    dim: usize,
    multiple: usize,
) -> std::result::Result<Side, String> {
    let mut floats = |name: &str, expected: &[usize]| {
        let name = format!("{prefix}.{name}");
        match tensors.remove(&name) {
            None => Err(format!("tensor {name} is missing")),
            Some((shape, _)) if shape != expected => Err(format!("tensor {name} is {shape:?} instead of {expected:?}")),
            Some((_, bytes)) => {
                Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>())
            }
        }
    };
    let (groups, rank, latent, mean) = match header {
        SideHeader::Dense => return Ok(Side::Dense),
        SideHeader::LowRank { groups, rank, latent, mean } => (groups, rank, latent, mean),
        SideHeader::Quantized(format) => {
            if let Some(p) = format.problem(dim) {
                return Err(format!("{prefix}: {p}"));
            }
            let codebooks = format.codebooks(heads, dim).map(|shape| floats("codebooks", &shape)).transpose()?;
            return Ok(Side::Quantized(Quantized { format, codebooks }));
        }
    };
    if let Some(p) = layout(&groups, rank, heads, dim, multiple) {
        return Err(format!("{prefix}: {p}"));
    }
    let basis = floats("basis", &[heads, dim, rank])?;
    let encoder = floats("encoder", &[groups.len(), rank, heads / groups.len() * dim])?;
    let mean = if mean { Some(floats("mean", &[heads, dim])?) } else { None };
    Ok(Side::LowRank(Factors { groups, rank, basis, encoder, mean, latent }))
}
