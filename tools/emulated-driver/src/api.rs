//! The driver API, as far as our programs call it: signatures and errors of CUDA 13.0's cuda.h.

use crate::device::{self, CAPABILITY, Device, L2_BYTES, NAME, Outcome, SHARED_PER_BLOCK, SHARED_PER_SM, SM_COUNT, VERSION};
use crate::functions::{Function, Launch};
use crate::memory::Owner;
use crate::streams::{Stream, Work};
use cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute, CUmemorytype as MemoryType,
    CUpointer_attribute as PointerAttribute, CUresult,
};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::rc::Rc;

/// A pointer to something that only the driver knows.
type Handle = usize;
type Address = c_ulonglong;

/// The first bytes of what nvcc calls a fatbin.
const FATBIN: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();
/// The one context and the one module, as handles.
const CONTEXT: Handle = 1;
const MODULE: Handle = 2;

fn answer(outcome: Outcome) -> CUresult {
    outcome.err().unwrap_or(CUresult::CUDA_SUCCESS)
}

/// Writes what a call gives back.
fn give<T>(to: *mut T, value: Outcome<T>) -> CUresult {
    if to.is_null() {
        return CUresult::CUDA_ERROR_INVALID_VALUE;
    }
    // SAFETY: the caller points to room for it.
    answer(value.map(|value| unsafe { to.write(value) }))
}

/// A call that needs the context.
fn call<T>(f: impl FnOnce(&mut Device) -> Outcome<T>) -> Outcome<T> {
    f(&mut *device::current()?)
}

/// Likewise one that captures do not permit.
fn unsafe_call<T>(f: impl FnOnce(&mut Device) -> Outcome<T>) -> Outcome<T> {
    call(|d| {
        d.uncaptured()?;
        f(d)
    })
}

fn removed<T>(value: Option<T>) -> Outcome {
    value.map(drop).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
}

macro_rules! driver_api {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:expr)*) => {
        $(
            /// See CUDA's documentation of the driver API.
            ///
            /// # Safety
            /// As there.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
                $body
            }
        )*
    };
}

driver_api! {
    fn cuInit(flags: c_uint) if flags == 0 {
        drop(device::raw(true));
        CUresult::CUDA_SUCCESS
    } else {
        CUresult::CUDA_ERROR_INVALID_VALUE
    }

    fn cuDriverGetVersion(version: *mut c_int) give(version, Ok(VERSION))

    fn cuGetErrorName(error: CUresult, name: *mut *const c_char) {
        // For ever: there are few, and the driver's own are too.
        give(name, Ok(CString::new(format!("{error:?}")).expect("a name").into_raw().cast_const()))
    }

    fn cuGetErrorString(error: CUresult, text: *mut *const c_char) {
        // SAFETY: the caller's promise.
        unsafe { cuGetErrorName(error, text) }
    }

    // ---- devices and contexts

    fn cuDeviceGetCount(count: *mut c_int) give(count, initialized().map(|()| 1))

    fn cuDeviceGet(found: *mut c_int, ordinal: c_int) give(found, known(ordinal).map(|()| 0))

    fn cuDeviceGetName(name: *mut c_char, bytes: c_int, ordinal: c_int) answer(known(ordinal).and_then(|()| {
        if usize::try_from(bytes).is_ok_and(|n| n > NAME.len()) && !name.is_null() {
            // SAFETY: there is room for it, and for the end.
            unsafe {
                std::ptr::copy_nonoverlapping(NAME.as_ptr(), name.cast(), NAME.len());
                name.add(NAME.len()).write(0);
            }
            return Ok(());
        }
        Err(CUresult::CUDA_ERROR_INVALID_VALUE)
    }))

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, ordinal: c_int)
        give(value, known(ordinal).and_then(|()| attribute_of(attribute)))

    fn cuDevicePrimaryCtxRetain(context: *mut Handle, ordinal: c_int) give(context, known(ordinal).and_then(|()| {
        device::raw(false).ok_or(CUresult::CUDA_ERROR_NOT_INITIALIZED)?.retained += 1;
        Ok(CONTEXT)
    }))

    fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) answer(known(ordinal).and_then(|()| {
        device::raw(false).ok_or(CUresult::CUDA_ERROR_NOT_INITIALIZED)?.release()
    }))

    fn cuCtxSetCurrent(context: Handle) {
        device::make_current(context == CONTEXT);
        if context == CONTEXT || context == 0 { CUresult::CUDA_SUCCESS } else { CUresult::CUDA_ERROR_INVALID_CONTEXT }
    }

    fn cuCtxSynchronize() answer(unsafe_call(Device::synchronize_all))

    // ---- modules and functions

    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) give(module, unsafe_call(|_| {
        if image.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: an image is longer than its magic number.
        let is_fatbin = unsafe { std::slice::from_raw_parts(image.cast::<u8>(), FATBIN.len()) } == FATBIN;
        if is_fatbin { Ok(MODULE) } else { Err(CUresult::CUDA_ERROR_INVALID_IMAGE) }
    }))

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) give(function, call(|d| {
        if module != MODULE {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        if name.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: a NUL-terminated name.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| CUresult::CUDA_ERROR_NOT_FOUND)?;
        let found = Function::find(name).ok_or(CUresult::CUDA_ERROR_NOT_FOUND)?;
        let handle = d.handle();
        d.functions.insert(handle, found);
        Ok(handle)
    }))

    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: Handle) give(value, call(|d| {
        let of = d.functions.get(&function).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let is = |a: FunctionAttribute| attribute == a as c_uint;
        let found = if is(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) {
            of.shared_bytes
        } else if is(FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS) {
            of.registers
        } else if is(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
            of.dynamic_limit
        } else {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        };
        Ok(found as c_int)
    }))

    fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int) answer(call(|d| {
        let of = d.functions.get_mut(&function).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let is_limit = attribute == FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
        match u32::try_from(value) {
            Ok(bytes) if is_limit => of.set_dynamic_limit(bytes),
            _ => Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        }
    }))

    fn cuLaunchKernel(
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void,
    ) answer(call(|d| {
        let of = *d.functions.get(&function).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        of.check(grid, block, shared_bytes)?;
        if parameters.is_null() || !extra.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: our kernels take one struct, to which the first of these points.
        let parameters = unsafe { std::slice::from_raw_parts((*parameters).cast::<u8>(), of.parameter_bytes) }.to_vec();
        d.enqueue(stream, Work::Launch(Rc::new(Launch { entry: of.entry, grid, block, shared_bytes, parameters })))
    }))

    // ---- memory

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) match give(total, Ok(crate::memory::TOTAL)) {
        CUresult::CUDA_SUCCESS => give(free, call(|d| Ok(d.memory.free_bytes()))),
        error => error,
    }

    fn cuMemAlloc_v2(address: *mut Address, bytes: usize)
        give(address, unsafe_call(|d| d.memory.allocate(bytes).map(|a| a as Address)))

    fn cuMemFree_v2(address: Address) answer(unsafe_call(|d| {
        d.synchronize_all()?;
        d.memory.free(address as usize)
    }))

    fn cuMemHostAlloc(address: *mut usize, bytes: usize, _flags: c_uint)
        give(address, unsafe_call(|d| d.memory.allocate_host(bytes)))

    fn cuMemFreeHost(address: usize) answer(unsafe_call(|d| d.memory.free_host(address)))

    fn cuPointerGetAttribute(value: *mut c_uint, attribute: c_uint, address: Address) give(value, call(|d| {
        let is_asked = attribute == PointerAttribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE as c_uint;
        match d.memory.owner(address as usize, 1)? {
            Owner::Device if is_asked => Ok(MemoryType::CU_MEMORYTYPE_DEVICE as c_uint),
            Owner::PageLocked if is_asked => Ok(MemoryType::CU_MEMORYTYPE_HOST as c_uint),
            _ => Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        }
    }))

    fn cuMemcpyAsync(to: Address, from: Address, bytes: usize, stream: Handle)
        answer(call(|d| d.copy(from as usize, to as usize, bytes, stream)))

    fn cuMemsetD8_v2(at: Address, byte: u8, bytes: usize) answer(unsafe_call(|d| d.set(at as usize, byte, bytes, 0)))

    fn cuMemsetD8Async(at: Address, byte: u8, bytes: usize, stream: Handle)
        answer(call(|d| d.set(at as usize, byte, bytes, stream)))

    // ---- streams, graphs, events

    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) give(stream, unsafe_call(|d| {
        let handle = d.handle();
        d.streams.insert(handle, Stream { blocking: flags & 1 == 0, ..Stream::default() });
        Ok(handle)
    }))

    fn cuStreamDestroy_v2(stream: Handle) answer(call(|d| d.destroy_stream(stream)))

    fn cuStreamSynchronize(stream: Handle) answer(call(|d| d.synchronize(stream)))

    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) give(status, call(|d| d.is_capturing(stream).map(|s| s as c_uint)))

    fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_uint) answer(call(|d| d.begin_capture(stream)))

    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) give(graph, call(|d| d.end_capture(stream)))

    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, _flags: c_ulonglong) give(executable, call(|d| {
        let work = d.graphs.get(&graph).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?.clone();
        let handle = d.handle();
        d.executables.insert(handle, work);
        Ok(handle)
    }))

    fn cuGraphLaunch(executable: Handle, stream: Handle) answer(call(|d| {
        let work = d.executables.get(&executable).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?.clone();
        work.into_iter().try_for_each(|w| d.enqueue(stream, w))
    }))

    fn cuGraphDestroy(graph: Handle) answer(call(|d| removed(d.graphs.remove(&graph))))

    fn cuGraphExecDestroy(executable: Handle) answer(call(|d| removed(d.executables.remove(&executable))))

    fn cuEventCreate(event: *mut Handle, _flags: c_uint) give(event, call(|d| {
        let handle = d.handle();
        d.events.insert(handle, None);
        Ok(handle)
    }))

    fn cuEventRecord(event: Handle, stream: Handle) answer(call(|d| d.record(event, stream)))

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle)
        give(milliseconds, call(|d| d.elapsed(start, end)))

    fn cuEventDestroy_v2(event: Handle) answer(call(|d| removed(d.events.remove(&event))))
}

fn initialized() -> Outcome {
    device::raw(false).map(drop).ok_or(CUresult::CUDA_ERROR_NOT_INITIALIZED)
}

fn known(ordinal: c_int) -> Outcome {
    initialized()?;
    if ordinal == 0 { Ok(()) } else { Err(CUresult::CUDA_ERROR_INVALID_DEVICE) }
}

fn attribute_of(attribute: c_uint) -> Outcome<c_int> {
    let known = [
        (Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CAPABILITY.0),
        (Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, CAPABILITY.1),
        (Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, SM_COUNT),
        (Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, SHARED_PER_BLOCK as c_int),
        (Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, SHARED_PER_SM as c_int),
        (Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, L2_BYTES),
    ];
    let found = known.into_iter().find(|(a, _)| *a as c_uint == attribute);
    found.map(|(_, value)| value).ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)
}
