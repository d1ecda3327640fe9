//! Reading formats of rows: the codec, its group, and the tensors that go with it.

use super::case::{Case, expect};
use super::lab::Lab;
use super::{OpError, Result, input};
use kvlar_reference::{Codebooks, Codec, Format, Storage};

/// How keys or values are stored, as a case says.
#[derive(Clone)]
pub struct Stored {
    /// The key that names the codec.
    pub key: &'static str,
    pub format: Format,
    scales: Option<Vec<f32>>,
    codebooks: Option<Centroids>,
}

#[derive(Clone)]
struct Centroids {
    subvectors: usize,
    width: usize,
    centroids: usize,
    values: Vec<f32>,
}

/// `group`: of every codec that the case names.
pub fn group(case: &mut Case) -> Result<Option<usize>> {
    let Some(text) = case.text("group") else { return Ok(None) };
    match text.trim().parse() {
        Ok(group) if group > 0 => Ok(Some(group)),
        _ => input(format!("group: {text:?} is not a whole number above 0")),
    }
}

/// A key that has no default.
pub fn required(case: &mut Case, key: &str) -> Result<usize> {
    match case.text(key) {
        None => input(format!("no key {key}")),
        Some(text) => text.trim().parse().or_else(|_| input(format!("{key}: {text:?} is not a whole number"))),
    }
}

impl Stored {
    /// The format that `key` names, for rows of `dim` values.
    pub fn read(case: &mut Case, key: &'static str, default: Option<&str>, group: Option<usize>, dim: usize) -> Result<Self> {
        let Some(text) = case.text(key).or(default.map(String::from)) else { return input(format!("no key {key}")) };
        let named = |e: String| OpError::Input(format!("{key}: {e}"));
        let format = Format { group, ..text.trim().parse::<Format>().map_err(named)? };
        format.check(dim).map_err(|e| named(e.to_string()))?;
        Ok(Self { key, format, scales: None, codebooks: None })
    }

    /// Takes `tensor [heads]`, the scales of fp8 rows, if it is there.
    pub fn with_scales(mut self, case: &mut Case, tensor: &str, heads: usize) -> Result<Self> {
        let Some(scales) = case.floats_if_any(tensor)? else { return Ok(self) };
        if self.format.codec != Codec::Fp8 {
            return input(format!("{tensor}: only fp8 rows have given scales; {} is {}", self.key, self.format));
        }
        expect(tensor, &scales.shape, &[heads])?;
        if let Some(bad) = scales.values.iter().find(|&&x| !(x > 0.0 && x.is_finite())) {
            return input(format!("{tensor}: {bad} is not a finite number above 0"));
        }
        self.scales = Some(scales.values);
        Ok(self)
    }

    /// Takes `codebooks [heads.., m, c, dim/m]`, which pq needs and no other codec has.
    pub fn with_codebooks(mut self, case: &mut Case, heads: Option<usize>, dim: usize) -> Result<Self> {
        let Some(tensor) = case.floats_if_any("codebooks")? else {
            if self.format.codec == Codec::Pq {
                return input(format!("no tensor codebooks; {} {} needs it", self.key, self.format));
            }
            return Ok(self);
        };
        if self.format.codec != Codec::Pq {
            return input(format!("codebooks: only pq has them; {} is {}", self.key, self.format));
        }
        let rank = if heads.is_some() { 4 } else { 3 };
        let [.., subvectors, centroids, width] = tensor.shape[..] else {
            return input(format!("codebooks is {:?}; it must have {rank} dimensions", tensor.shape));
        };
        let expected: Vec<usize> = heads.into_iter().chain([subvectors, centroids, width]).collect();
        expect("codebooks", &tensor.shape, &expected)?;
        if subvectors.checked_mul(width) != Some(dim) {
            return input(format!(
                "codebooks is {:?}: {subvectors} sub-vectors of {width} are not {dim} dimensions",
                tensor.shape
            ));
        }
        let codebooks = Centroids { subvectors, width, centroids, values: tensor.values };
        codebooks.borrowed().check(heads.unwrap_or(1), dim)?;
        self.codebooks = Some(codebooks);
        Ok(self)
    }

    /// As the reference takes it.
    pub fn storage(&self) -> Storage<'_> {
        let codebooks = self.codebooks.as_ref().map(Centroids::borrowed);
        Storage { format: self.format, scales: self.scales.as_deref(), codebooks }
    }

    /// The launchers' format, if they have it.
    pub fn launched(&self) -> Result<kvlar::Format> {
        let Format { codec, group, hadamard } = self.format;
        let bare = kvlar::Codec::ALL.into_iter().find(|c| c.reference() == codec).map(kvlar::Format::from);
        match (bare, &self.codebooks) {
            (Some(_), Some(c)) => Ok(kvlar::Format { hadamard, ..kvlar::Format::pq(c.width, c.centroids) }),
            (Some(format), None) => Ok(kvlar::Format { group, hadamard, ..format }),
            (None, _) => Err(OpError::Unsupported(format!("{} {} runs on the reference only", self.key, self.format))),
        }
    }

    /// Scales of fp8 rows, or codebooks, on a device.
    pub fn upload_tables(&self, lab: &Lab) -> Result<Option<kvlar::Buffer>> {
        let tables = self.scales.as_ref().or(self.codebooks.as_ref().map(|c| &c.values));
        tables.map(|t| lab.upload(t)).transpose()
    }
}

impl Centroids {
    fn borrowed(&self) -> Codebooks<'_> {
        Codebooks { subvectors: self.subvectors, centroids: self.centroids, values: &self.values }
    }
}
