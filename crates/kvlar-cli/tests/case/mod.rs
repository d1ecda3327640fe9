//! Cases of `kvlar op`: written, run, read back.
#![allow(dead_code)] // each suite uses a part

use kvlar_reference::Dtype as Type;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::OnceLock;

/// A case being written.
#[derive(Clone, Default)]
pub struct Case {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    keys: HashMap<String, String>,
}

impl Case {
    pub fn floats(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        self.tensors.push((name.into(), Dtype::F32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        self
    }
    pub fn ints(mut self, name: &str, shape: &[usize], values: &[i32]) -> Self {
        self.tensors.push((name.into(), Dtype::I32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        self
    }
    pub fn bytes(mut self, name: &str, shape: &[usize], values: &[u8]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        self.tensors.push((name.into(), Dtype::U8, shape.to_vec(), values.to_vec()));
        self
    }
    pub fn key(mut self, key: &str, value: &str) -> Self {
        self.keys.insert(key.into(), value.into());
        self
    }
    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self
    }
    pub fn write(&self, path: &Path) {
        let views = self.tensors.iter().map(|(n, t, s, b)| (n.clone(), TensorView::new(*t, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, Some(self.keys.clone()), path).unwrap();
    }
}

pub struct Run {
    pub output: Output,
    pub dir: tempfile::TempDir,
}

pub fn run(op: &str, backend: &str, case: &Case, more: &[&str]) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("case.safetensors"), dir.path().join("out.safetensors"));
    case.write(&input);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvlar"));
    command.args(["op", op, "--backend", backend, "--in"]).arg(&input).arg("--out").arg(&out).args(more);
    Run { output: command.output().unwrap(), dir }
}

impl Run {
    #[track_caller]
    pub fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, data) = self.stored(name, Dtype::F32);
        (shape, data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    #[track_caller]
    pub fn ints(&self, name: &str, shape: &[usize]) -> Vec<i32> {
        let (found, data) = self.stored(name, Dtype::I32);
        assert_eq!(found, shape);
        data.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[track_caller]
    pub fn bytes(&self, name: &str, shape: &[usize]) -> Vec<u8> {
        let (found, data) = self.stored(name, Dtype::U8);
        assert_eq!(found, shape);
        data
    }

    #[track_caller]
    fn stored(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let text = String::from_utf8_lossy(&self.output.stderr);
        assert!(self.output.status.success(), "{text}");
        let bytes = std::fs::read(self.dir.path().join("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let t = file.tensor(name).unwrap();
        assert_eq!(t.dtype(), dtype);
        (t.shape().to_vec(), t.data().to_vec())
    }

    #[track_caller]
    pub fn fails(&self, status: i32, word: &str) {
        let text = String::from_utf8_lossy(&self.output.stderr);
        assert_eq!(self.output.status.code(), Some(status), "{text}");
        assert!(text.contains(word), "{text:?} does not say {word:?}");
        assert!(!self.dir.path().join("out.safetensors").exists(), "something was written");
        assert!(!text.contains("panicked"), "{text}");
    }
}

/// The backends that there are here.
pub fn backends() -> Vec<&'static str> {
    let simt = kvlar_kernels::simt::available().then_some("simt");
    ["reference"].into_iter().chain(simt).chain(gpu()).collect()
}

/// The one to compare with the reference: the GPU where there is one, else the emulation.
pub fn kernels() -> Option<&'static str> {
    backends().pop().filter(|b| *b != "reference")
}

/// `cuda` where it works; a failure where it does not, and `KVLAR_REQUIRE_GPU` is set.
fn gpu() -> Option<&'static str> {
    static GPU: OnceLock<kvlar::Result<()>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| kvlar::Device::cuda(0).map(drop));
    assert!(gpu.is_ok() || std::env::var_os("KVLAR_REQUIRE_GPU").is_none(), "KVLAR_REQUIRE_GPU is set: {gpu:?}");
    gpu.is_ok().then_some("cuda")
}

/// A tensor of a case, rounded.
pub fn values(case: &Case, name: &str, round: Type) -> Vec<f32> {
    let t = case.tensors.iter().find(|t| t.0 == name).unwrap();
    round.round_all(&t.3.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>())
}
