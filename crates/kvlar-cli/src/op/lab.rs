//! A device, and tensors on their way to it and back.

use super::{OpError, Result};
use crate::backend::Backend;
use kvlar::{Buffer, Device, Dtype, Stream};

pub fn reference_dtype(dtype: Dtype) -> kvlar_reference::Dtype {
    match dtype {
        Dtype::Bf16 => kvlar_reference::Dtype::Bf16,
        Dtype::F16 => kvlar_reference::Dtype::F16,
        Dtype::F32 => kvlar_reference::Dtype::F32,
    }
}

/// A device and what is needed to move tensors.
pub struct Lab {
    pub device: Device,
    pub stream: Stream,
}

impl Lab {
    pub fn open(backend: Backend, dtype: Dtype) -> Result<Self> {
        if dtype == Dtype::F32 {
            return Err(OpError::Unsupported("dtype f32 runs on the reference only".into()));
        }
        let device = backend.open()?;
        Ok(Self { stream: device.stream()?, device })
    }

    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = self.device.alloc(bytes.len())?;
        self.stream.upload(&mut buffer, 0, bytes)?;
        Ok(buffer)
    }

    pub fn upload_as(&self, values: &[f32], dtype: Dtype) -> Result<Buffer> {
        match dtype {
            Dtype::F32 => self.upload(values),
            Dtype::Bf16 => self.upload(&values.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect::<Vec<_>>()),
            Dtype::F16 => self.upload(&values.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect::<Vec<_>>()),
        }
    }

    pub fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        let mut values = vec![0f32; buffer.len() / 4];
        self.stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}
