//! Files of gates: safetensors, tensors `layers.{i}.{name}`, all else as JSON in the metadata key `kvlar.gates`.
//!
//! `kvlar.gates` is `{"format": version, "fingerprint": model, "layers": L, "gate_dim": D', "sha256": hash}`. The hash may be
//! absent, so that a converter of released gates need not know it.

use super::{Gate, GateShape, NAMES};
use crate::error::{Error, Result, config as refuse};
use crate::file::{Tensors, hash, whole};
use crate::shape::ModelShape;
use half::{bf16, f16};
use kvlar_reference::Dtype;
use safetensors::tensor::{self, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// The version of gate files that this build writes, and reads.
pub const GATE_FORMAT: u32 = 1;

const KEY: &str = "kvlar.gates";
/// No model has more; a damaged file may claim to.
const MOST_LAYERS: usize = 1 << 16;

/// Gates of a model's layers, all of one shape. Layers without a gate (such as those of sliding-window attention in a hybrid
/// model) are not evicted from, and scores and thresholds are over the others alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Gates {
    fingerprint: String,
    dtype: Dtype,
    shape: GateShape,
    layers: Vec<Option<Gate>>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    fingerprint: String,
    layers: usize,
    gate_dim: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

impl Header {
    /// What the hash covers besides tensors.
    fn text(&self) -> String {
        format!("{}\n{}\n{}", self.fingerprint, self.layers, self.gate_dim)
    }
}

/// Read first, so that an unknown version is named whatever else it holds.
#[derive(Deserialize)]
struct AnyVersion {
    format: u32,
}

impl Gates {
    /// Gates of the model with this fingerprint, one place a layer. Projections, biases and `b` are rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::Config`] without a gate or with gates of different shapes; [`Error::Op`] as [`Gate::check`].
    pub fn new(fingerprint: impl Into<String>, dtype: Dtype, mut layers: Vec<Option<Gate>>) -> Result<Self> {
        let Some(shape) = layers.iter().flatten().map(|g| g.shape).next() else {
            return refuse("gates", format!("none of the {} layers has one", layers.len()));
        };
        for (l, gate) in layers.iter_mut().enumerate() {
            let Some(gate) = gate else { continue };
            if gate.shape != shape {
                return refuse("gates", format!("layer {l} is of another shape than the gates before it"));
            }
            gate.round(dtype);
            gate.check()?;
        }
        Ok(Self { fingerprint: fingerprint.into(), dtype, shape, layers })
    }

    /// Of which model.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What projections, biases and `b` are stored as, and what projections of tokens are rounded to.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes of every gate.
    pub fn shape(&self) -> GateShape {
        self.shape
    }

    /// One place a layer of the model.
    pub fn layers(&self) -> &[Option<Gate>] {
        &self.layers
    }

    /// The gate of a layer, if it has one.
    pub fn layer(&self, layer: usize) -> Option<&Gate> {
        self.layers.get(layer)?.as_ref()
    }

    /// The layers that have a gate, ascending.
    pub fn gated(&self) -> impl Iterator<Item = (usize, &Gate)> {
        self.layers.iter().enumerate().filter_map(|(l, gate)| Some((l, gate.as_ref()?)))
    }

    /// Refuses gates of another model.
    ///
    /// # Errors
    /// [`Error::GatesOfOtherModel`] naming both fingerprints; [`Error::Config`] for gates whose sizes are not the model's.
    pub fn check_model(&self, fingerprint: &str, model: &ModelShape) -> Result<()> {
        if self.fingerprint != fingerprint {
            return Err(Error::GatesOfOtherModel { gates: self.fingerprint.clone(), model: fingerprint.into() });
        }
        let GateShape { hidden, kv_heads, group, .. } = self.shape;
        let (ours, theirs) = (
            (self.layers.len(), hidden, kv_heads, group),
            (model.layers, model.hidden, model.layer.kv_heads, model.layer.q_heads / model.layer.kv_heads.max(1)),
        );
        if ours != theirs {
            return refuse("gates", format!("layers, hidden size, kv heads and group are {ours:?}, the model's are {theirs:?}"));
        }
        Ok(())
    }

    /// Writes the gates: beside the file, then renamed, so that the file is there whole or not at all. The same gates give the
    /// same bytes.
    ///
    /// # Errors
    /// [`Error::File`] if writing fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| Error::GateFile { path: path.into(), problem: e.to_string() };
        let mut tensors = Tensors::new();
        let mut types = HashMap::new();
        for (l, gate) in self.gated() {
            for ((name, shape), values) in gate.shape.tensors().into_iter().zip(gate.tensors()) {
                let dtype = stored(name, self.dtype);
                let name = format!("layers.{l}.{name}");
                tensors.insert(name.clone(), (shape, bytes(values, dtype)));
                types.insert(name, dtype);
            }
        }
        let (fingerprint, layers, gate_dim) = (self.fingerprint.clone(), self.layers.len(), self.shape.gate_dim);
        let mut header = Header { format: GATE_FORMAT, fingerprint, layers, gate_dim, sha256: None };
        header.sha256 = Some(hash(&header.text(), &tensors));
        let text = serde_json::to_string(&header).map_err(|e| failed(&e))?;
        let mut views = Vec::with_capacity(tensors.len());
        for (name, (shape, bytes)) in &tensors {
            let dtype = match types[name] {
                Dtype::F32 => tensor::Dtype::F32,
                Dtype::F16 => tensor::Dtype::F16,
                Dtype::Bf16 => tensor::Dtype::BF16,
            };
            views.push((name.clone(), TensorView::new(dtype, shape.clone(), bytes).map_err(|e| failed(&e))?));
        }
        let metadata = HashMap::from([(KEY.to_string(), text)]);
        whole(path, &safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))?)
    }

    /// Reads gates. Their dimensions follow from the tensors; projections, biases and `b` may be in bf16, f16 or f32, alike in
    /// all layers, the other tensors are in f32.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::GateVersion`] for another version, [`Error::GateFile`] for anything that
    /// does not hold whole, sound gates: not a file of gates, bytes changed since it was written, tensors missing, unknown,
    /// misshapen or not finite.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::File { path: path.into(), source })?;
        let bad = |problem: String| Error::GateFile { path: path.into(), problem };
        let Ok((_, metadata)) = SafeTensors::read_metadata(&bytes) else {
            return Err(bad("not a safetensors file, or cut off; train the gates again".into()));
        };
        let Some(text) = metadata.metadata().as_ref().and_then(|m| m.get(KEY)) else {
            let made_by = "`kvlar calibrate --method fast-kvzip` writes them";
            return Err(bad(format!("no gates: its metadata has no {KEY}; {made_by}")));
        };
        let version: AnyVersion = serde_json::from_str(text).map_err(|e| bad(format!("its format version: {e}")))?;
        if version.format != GATE_FORMAT {
            return Err(Error::GateVersion { path: path.into(), found: version.format, known: GATE_FORMAT });
        }
        let header: Header = serde_json::from_str(text).map_err(|e| bad(format!("its metadata: {e}")))?;
        let Ok(file) = SafeTensors::deserialize(&bytes) else {
            return Err(bad("cut off or damaged: its tensors do not fill the file; train the gates again".into()));
        };
        let mut tensors = Tensors::new();
        let mut types = HashMap::new();
        for (name, t) in file.tensors() {
            types.insert(name.clone(), t.dtype());
            tensors.insert(name, (t.shape().to_vec(), t.data().to_vec()));
        }
        if header.sha256.as_ref().is_some_and(|sum| *sum != hash(&header.text(), &tensors)) {
            return Err(bad("its bytes are not those that were written (hash mismatch); train the gates again".into()));
        }
        assemble(&header, tensors, &types).map_err(bad)
    }
}

/// What a tensor of gates in `dtype` is stored as: the released ones keep norms and sink keys in f32.
fn stored(name: &str, dtype: Dtype) -> Dtype {
    if ["q_norm.weight", "k_norm.weight", "k_base"].contains(&name) { Dtype::F32 } else { dtype }
}

fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn values(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => pairs.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => pairs.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
    }
}

fn assemble(header: &Header, mut tensors: Tensors, types: &HashMap<String, tensor::Dtype>) -> std::result::Result<Gates, String> {
    if header.layers == 0 || header.layers > MOST_LAYERS {
        return Err(format!("{} layers, which no model has", header.layers));
    }
    let (mut dtype, mut layers) = (None, Vec::with_capacity(header.layers));
    for l in 0..header.layers {
        let name = |name: &str| format!("layers.{l}.{name}");
        if !NAMES.iter().any(|n| tensors.contains_key(&name(n))) {
            layers.push(None);
            continue;
        }
        let shape = infer(&tensors, l, header.gate_dim)?;
        let mut parts = Vec::new();
        for (part, expected) in shape.tensors() {
            let name = name(part);
            let (found, bytes) = tensors.remove(&name).ok_or(format!("tensor {name} is missing"))?;
            if found != expected {
                return Err(format!("tensor {name} is {found:?} instead of {expected:?}"));
            }
            let found = match types[&name] {
                tensor::Dtype::F32 => Dtype::F32,
                tensor::Dtype::F16 => Dtype::F16,
                tensor::Dtype::BF16 => Dtype::Bf16,
                other => return Err(format!("tensor {name} is {other:?}; gates are in BF16, F16 or F32")),
            };
            let expected = stored(part, *dtype.get_or_insert(found));
            if found != expected {
                return Err(format!("tensor {name} is {found:?} instead of {expected:?}"));
            }
            parts.push(values(&bytes, found));
        }
        let mut parts = parts.into_iter();
        layers.push(Some(Gate::of(shape, || parts.next().unwrap_or_default())));
    }
    if let Some(name) = tensors.keys().next() {
        return Err(format!("tensor {name} belongs to no gate of {} layers", header.layers));
    }
    Gates::new(&*header.fingerprint, dtype.unwrap_or(Dtype::F32), layers).map_err(|e| e.to_string())
}

/// Sizes of a layer's gate, from its tensors.
fn infer(tensors: &Tensors, layer: usize, gate_dim: usize) -> std::result::Result<GateShape, String> {
    let shape = |name: &str, dims: usize| {
        let name = format!("layers.{layer}.{name}");
        match tensors.get(&name) {
            None => Err(format!("tensor {name} is missing")),
            Some((shape, _)) if shape.len() != dims => Err(format!("tensor {name} is {shape:?}: it must have {dims} dimensions")),
            Some((shape, _)) => Ok(shape.clone()),
        }
    };
    let (q, k, base) = (shape("q_proj.weight", 2)?, shape("k_proj.weight", 2)?, shape("k_base", 4)?);
    let norm = shape("q_norm.weight", 1)?[0];
    if norm != gate_dim {
        return Err(format!("layers.{layer}: q_norm.weight has {norm} numbers, its metadata says {gate_dim} (gate_dim)"));
    }
    if norm == 0 || k[0] == 0 || !k[0].is_multiple_of(norm) || q[0] == 0 || !q[0].is_multiple_of(k[0]) {
        return Err(format!(
            "layers.{layer}: {} rows of q_proj.weight and {} of k_proj.weight are no heads of {norm} rows, so many of the one \
             for each of the other",
            q[0], k[0]
        ));
    }
    Ok(GateShape { hidden: q[1], kv_heads: k[0] / norm, group: q[0] / k[0], gate_dim: norm, sinks: base[2] })
}

/// A type by the name that it has elsewhere.
pub(super) mod dtype {
    use kvlar_reference::Dtype;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(dtype: &Dtype, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(match dtype {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        })
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Dtype, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
