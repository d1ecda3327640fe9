//! Memory that launches use.

use crate::device::{Home, Place};
use crate::{Device, Error, Result};
use std::marker::PhantomData;
use std::ops::Range;

/// Memory of a [`Device`], or of its host ([`Device::alloc_host`]): zeroed, 256-byte aligned, exactly as large as asked for.
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
    home: Home,
}

impl Buffer {
    pub(crate) fn new(device: &Device, bytes: usize, home: Home) -> Result<Self> {
        let address = if bytes == 0 { 0 } else { device.driver().alloc(bytes, home)? };
        Ok(Self { device: device.clone(), address, bytes, home })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where it is, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whether it is memory of the host.
    pub fn is_on_host(&self) -> bool {
        self.home == Home::Host
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_> {
        View { address: self.address, bytes: self.bytes, owner: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { address: self.address, bytes: self.bytes, owner: PhantomData }
    }

    /// Of the byte at `offset`.
    pub(crate) fn place(&self, offset: usize) -> Place {
        Place { address: self.address + offset as u64, home: self.home }
    }

    pub(crate) fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.start <= range.end && range.end <= self.bytes {
            return Ok(());
        }
        Err(Error::Bounds { arg: "buffer range", need: range.end.max(range.start), have: self.bytes })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.driver().free(self.address, self.bytes, self.home);
        }
    }
}

/// A piece of device memory that a launch may use.
pub trait Memory {
    /// Its address on the device.
    fn address(&self) -> u64;
    /// Its size in bytes.
    fn bytes(&self) -> usize;
}

/// Device memory to read.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    address: u64,
    bytes: usize,
    owner: PhantomData<&'a ()>,
}

/// Device memory to write.
#[derive(Debug)]
pub struct ViewMut<'a> {
    address: u64,
    bytes: usize,
    owner: PhantomData<&'a mut ()>,
}

impl Memory for View<'_> {
    fn address(&self) -> u64 {
        self.address
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Memory for ViewMut<'_> {
    fn address(&self) -> u64 {
        self.address
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

fn bounded(have: usize, range: &Range<usize>) -> Result<()> {
    if range.start <= range.end && range.end <= have {
        return Ok(());
    }
    Err(Error::Bounds { arg: "view range", need: range.end.max(range.start), have })
}

impl<'a> View<'a> {
    /// Memory of an engine's own tensor.
    ///
    /// # Safety
    /// `bytes` bytes at `address` are readable by the device for `'a`, and by launches enqueued within it.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address, bytes, owner: PhantomData }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::Bounds`] if the range does not lie within it.
    pub fn slice(self, range: Range<usize>) -> Result<Self> {
        bounded(self.bytes, &range)?;
        Ok(Self { address: self.address + range.start as u64, bytes: range.len(), owner: PhantomData })
    }
}

impl<'a> ViewMut<'a> {
    /// Memory of an engine's own tensor.
    ///
    /// # Safety
    /// `bytes` bytes at `address` are writable by the device for `'a`, and by launches enqueued within it; nothing else
    /// uses them meanwhile.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address, bytes, owner: PhantomData }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::Bounds`] if the range does not lie within it.
    pub fn slice(self, range: Range<usize>) -> Result<Self> {
        bounded(self.bytes, &range)?;
        Ok(Self { address: self.address + range.start as u64, bytes: range.len(), owner: PhantomData })
    }

    /// Two parts of it, cut at `at` bytes.
    ///
    /// # Errors
    /// [`Error::Bounds`] if `at` lies beyond its end.
    pub fn split_at(self, at: usize) -> Result<(Self, Self)> {
        bounded(self.bytes, &(0..at))?;
        let rest = Self { address: self.address + at as u64, bytes: self.bytes - at, owner: PhantomData };
        Ok((Self { address: self.address, bytes: at, owner: PhantomData }, rest))
    }

    /// The same memory, to read.
    pub fn as_view(&self) -> View<'_> {
        View { address: self.address, bytes: self.bytes, owner: PhantomData }
    }
}
