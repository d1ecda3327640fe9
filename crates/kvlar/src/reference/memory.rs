//! Memory behind addresses of parameter structs.

use crate::Dtype;
use bytemuck::Pod;
use half::{bf16, f16};

/// # Safety
/// `count` values at `address` are readable.
pub unsafe fn read<T: Pod>(address: u64, count: usize) -> Vec<T> {
    let p = address as *const T;
    (0..count).map(|i| unsafe { p.add(i).read_unaligned() }).collect()
}

/// # Safety
/// `values.len()` values at `address` are writable.
pub unsafe fn write<T: Pod>(address: u64, values: &[T]) {
    let p = address as *mut T;
    for (i, v) in values.iter().enumerate() {
        unsafe { p.add(i).write_unaligned(*v) };
    }
}

/// The `i32` at element `index`.
///
/// # Safety
/// It is readable.
pub unsafe fn int(address: u64, index: i64) -> i32 {
    unsafe { (address as *const i32).offset(index as isize).read_unaligned() }
}

/// `count` values from element `index` on, as f32.
///
/// # Safety
/// They are readable.
pub unsafe fn dense(address: u64, index: i64, count: usize, dtype: Dtype) -> Vec<f32> {
    let at = address.wrapping_add_signed(index * dtype.bytes() as i64);
    unsafe {
        match dtype {
            Dtype::F32 => read::<f32>(at, count),
            Dtype::Bf16 => read::<u16>(at, count).into_iter().map(|x| bf16::from_bits(x).to_f32()).collect(),
            Dtype::F16 => read::<u16>(at, count).into_iter().map(|x| f16::from_bits(x).to_f32()).collect(),
        }
    }
}

/// Writes values from element `index` on, rounded to `dtype`.
///
/// # Safety
/// They are writable.
pub unsafe fn store_dense(address: u64, index: i64, values: &[f32], dtype: Dtype) {
    let at = address.wrapping_add_signed(index * dtype.bytes() as i64);
    unsafe {
        match dtype {
            Dtype::F32 => write(at, values),
            Dtype::Bf16 => write(at, &values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>()),
            Dtype::F16 => write(at, &values.iter().map(|&x| f16::from_f32(x).to_bits()).collect::<Vec<_>>()),
        }
    }
}
