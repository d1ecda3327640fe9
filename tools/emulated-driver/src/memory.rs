//! Memory of the device, which the host cannot touch, and page-locked memory, which both can.

use cudarc::driver::sys::CUresult;
use std::collections::BTreeMap;

/// Memory of the device, bytes.
pub const TOTAL: usize = 4 << 30;
/// As of cuMemAlloc.
const ALIGN: usize = 256;
/// What memory holds that nobody has written: NaN in every float format, −1 in integers.
const UNWRITTEN: u8 = 0xff;

/// Whose memory a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Device,
    PageLocked,
    /// The process's own, of which a driver knows nothing.
    Pageable,
}

pub struct Memory {
    base: usize,
    /// Address and bytes of what is allocated.
    device: BTreeMap<usize, usize>,
    page_locked: BTreeMap<usize, usize>,
}

fn map(bytes: usize, protection: i32) -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping touches no other.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    (address != libc::MAP_FAILED).then_some(address as usize)
}

/// The allocation that holds `bytes` bytes from `address` on: its address and size.
fn within(allocations: &BTreeMap<usize, usize>, address: usize, bytes: usize) -> Option<(usize, usize)> {
    let (&start, &size) = allocations.range(..=address).next_back()?;
    (address - start <= size && bytes <= size - (address - start)).then_some((start, size))
}

impl Memory {
    pub fn new() -> Self {
        let base = map(TOTAL, libc::PROT_NONE).expect("address space");
        Self { base, device: BTreeMap::new(), page_locked: BTreeMap::new() }
    }

    fn is_of_device(&self, address: usize) -> bool {
        (self.base..=self.base + TOTAL).contains(&address)
    }

    /// Lets `f`, the device, at what is allocated of its memory.
    pub fn open<R>(&self, f: impl FnOnce() -> R) -> R {
        let protect = |protection| {
            let end = self.device.last_key_value().map_or(self.base, |(address, bytes)| address + bytes);
            // SAFETY: the arena is ours.
            let failed = unsafe { libc::mprotect(self.base as *mut _, end - self.base, protection) };
            assert_eq!(failed, 0, "the arena's protection");
        };
        protect(libc::PROT_READ | libc::PROT_WRITE);
        let result = f();
        protect(libc::PROT_NONE);
        result
    }

    /// What an allocation holds from here on.
    fn forget(&self, address: usize, bytes: usize) {
        // SAFETY: allocated, and open.
        self.open(|| unsafe { std::ptr::write_bytes(address as *mut u8, UNWRITTEN, bytes) });
    }

    pub fn free_bytes(&self) -> usize {
        TOTAL - self.device.values().sum::<usize>()
    }

    pub fn allocate(&mut self, bytes: usize) -> Result<usize, CUresult> {
        if bytes == 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let mut address = self.base;
        for (&start, &size) in &self.device {
            if start - address >= bytes {
                break;
            }
            address = (start + size).next_multiple_of(ALIGN);
        }
        if bytes > TOTAL || address - self.base > TOTAL - bytes {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        self.device.insert(address, bytes);
        self.forget(address, bytes);
        Ok(address)
    }

    pub fn free(&mut self, address: usize) -> Result<(), CUresult> {
        let bytes = *self.device.get(&address).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        self.forget(address, bytes);
        self.device.remove(&address);
        Ok(())
    }

    pub fn allocate_host(&mut self, bytes: usize) -> Result<usize, CUresult> {
        if bytes == 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let limited = (bytes <= TOTAL).then(|| map(bytes, libc::PROT_READ | libc::PROT_WRITE)).flatten();
        let address = limited.ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        // SAFETY: just mapped.
        unsafe { std::ptr::write_bytes(address as *mut u8, UNWRITTEN, bytes) };
        self.page_locked.insert(address, bytes);
        Ok(address)
    }

    pub fn free_host(&mut self, address: usize) -> Result<(), CUresult> {
        let bytes = self.page_locked.remove(&address).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        // SAFETY: mapped above, and unknown from here on.
        unsafe { libc::munmap(address as *mut _, bytes) };
        Ok(())
    }

    /// Whose a range is; an error for one that begins in an allocation and ends elsewhere, or is of the device's and not
    /// allocated.
    pub fn owner(&self, address: usize, bytes: usize) -> Result<Owner, CUresult> {
        if within(&self.device, address, bytes).is_some() {
            return Ok(Owner::Device);
        }
        if within(&self.page_locked, address, bytes).is_some() {
            return Ok(Owner::PageLocked);
        }
        let begins_in_one = within(&self.page_locked, address, 1).is_some();
        if self.is_of_device(address) || begins_in_one { Err(CUresult::CUDA_ERROR_INVALID_VALUE) } else { Ok(Owner::Pageable) }
    }

    /// What of a launch's parameters a device could not follow: words that are addresses of freed memory of the device, or of
    /// memory that only the host has.
    pub fn unreachable(&self, parameters: &[u8]) -> Option<String> {
        let words = parameters.chunks_exact(8).enumerate();
        let mut words = words.map(|(i, w)| (8 * i, usize::from_ne_bytes(w.try_into().expect("eight bytes"))));
        words.find_map(|(at, word)| {
            if within(&self.device, word, 0).is_some() || within(&self.page_locked, word, 0).is_some() {
                return None;
            }
            let what = if self.is_of_device(word) {
                "no allocation's"
            } else if is_mapped(word) {
                "the host's, and not page-locked"
            } else {
                return None;
            };
            Some(format!("the address {word:#x} at byte {at} of the parameters is {what}"))
        })
    }

    pub fn allocations(&self) -> usize {
        self.device.len() + self.page_locked.len()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let page_locked = self.page_locked.iter().map(|(&address, &bytes)| (address, bytes));
        for (address, bytes) in page_locked.chain([(self.base, TOTAL)]) {
            // SAFETY: mapped by us; what is left in it ends with the context.
            unsafe { libc::munmap(address as *mut _, bytes) };
        }
    }
}

/// Whether an address is one of the process's.
fn is_mapped(address: usize) -> bool {
    const PAGE: usize = 4096;
    // Below are counts and strides.
    if !(1 << 40..1 << 47).contains(&address) {
        return false;
    }
    // SAFETY: with this flag it changes nothing; it fails for what is not mapped.
    unsafe { libc::msync((address / PAGE * PAGE) as *mut _, 1, libc::MS_ASYNC) == 0 }
}
