//! The driver is as strict as it says.

use crate::api::*;
use cudarc::driver::sys::{CUfunction_attribute as FunctionAttribute, CUresult};
use kvlar_kernels::params::KvlarMerge;
use std::ffi::{CStr, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

const OK: CUresult = CUresult::CUDA_SUCCESS;
const NON_BLOCKING: c_uint = 1;

/// The context, of one test at a time: it begins and ends with it.
struct Context(#[allow(dead_code)] MutexGuard<'static, ()>);

impl Context {
    fn new() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut context = 0;
        // SAFETY: the pointer is to a local.
        assert_eq!(unsafe { (cuInit(0), cuDevicePrimaryCtxRetain(&mut context, 0), cuCtxSetCurrent(context)) }, (OK, OK, OK));
        Self(guard)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained above.
        assert_eq!(unsafe { cuDevicePrimaryCtxRelease_v2(0) }, OK);
    }
}

/// Calls that succeed.
macro_rules! ok {
    ($($call:expr);+ $(;)?) => {
        // SAFETY: addresses and handles are of the test, and as large as it says.
        $(assert_eq!(unsafe { $call }, OK, stringify!($call));)+
    };
}

/// One that does not.
macro_rules! fails {
    ($call:expr, $error:ident) => {
        // SAFETY: as above.
        assert_eq!(unsafe { $call }, CUresult::$error, stringify!($call));
    };
}

fn stream() -> usize {
    let mut stream = 0;
    ok!(cuStreamCreate(&mut stream, NON_BLOCKING));
    stream
}

fn memory(bytes: usize) -> u64 {
    let mut address = 0;
    ok!(cuMemAlloc_v2(&mut address, bytes));
    address
}

fn page_locked(bytes: usize) -> &'static mut [u8] {
    let mut address = 0;
    ok!(cuMemHostAlloc(&mut address, bytes, 0));
    // SAFETY: allocated, and not freed before the context.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) }
}

fn address(of: &[u8]) -> u64 {
    of.as_ptr() as u64
}

/// What memory holds when a stream has come so far.
fn download(from: u64, bytes: usize, stream: usize) -> Vec<u8> {
    let to = vec![1; bytes];
    ok!(cuMemcpyAsync(address(&to), from, bytes, stream));
    to
}

fn function(name: &CStr) -> usize {
    let (mut module, mut function) = (0, 0);
    ok!(
        cuModuleLoadData(&mut module, 0xba55_ed50_u32.to_le_bytes().as_ptr().cast());
        cuModuleGetFunction(&mut function, module, name.as_ptr());
    );
    function
}

fn launch(function: usize, grid: u32, block: u32, shared: u32, stream: usize, params: &KvlarMerge) -> CUresult {
    let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
    // SAFETY: the struct is larger than those of the functions that are not merges, which are refused.
    unsafe { cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, arguments.as_mut_ptr(), std::ptr::null_mut()) }
}

/// A merge of one part of one row of `dim` numbers.
fn merge(parts: u64, part_lse: u64, out: u64, lse: u64, dim: u32) -> KvlarMerge {
    KvlarMerge { parts, part_lse, out, lse, part_count: 1, row_count: 1, dim, reserved: 0 }
}

#[test]
fn work_is_done_when_it_is_waited_for() {
    let _context = Context::new();
    let (s, device, host) = (stream(), memory(8), page_locked(8));
    assert_eq!(host, [0xff; 8], "nobody has written it");
    assert_eq!(download(device, 8, s), [0xff; 8], "nobody has written it");
    ok!(cuMemsetD8Async(device, 3, 8, s); cuMemcpyAsync(address(host), device, 8, s));
    assert_eq!(host, [0xff; 8]);
    ok!(cuStreamSynchronize(s));
    assert_eq!(host, [3; 8]);
    // A page-locked source is read when it is its turn, a pageable one at once.
    let mut pageable = vec![5; 8];
    ok!(cuMemcpyAsync(device, address(host), 8, s));
    host.fill(4);
    assert_eq!(download(device, 8, s), [4; 8]);
    ok!(cuMemcpyAsync(device, address(&pageable), 8, s));
    pageable.fill(6);
    assert_eq!(download(device, 8, s), [5; 8]);
}

#[test]
fn streams_wait_for_nobody() {
    let _context = Context::new();
    let (a, b, device) = (stream(), stream(), memory(8));
    ok!(cuMemsetD8Async(device, 3, 8, a));
    assert_eq!(download(device, 8, b), [0xff; 8]);
    ok!(cuMemsetD8_v2(device, 4, 8));
    assert_eq!(download(device, 8, b), [0xff; 8], "the default stream's, which such streams do not wait for");
    assert_eq!(download(device, 8, 0), [4; 8]);
    // Also when it is gone: then the context can be waited for.
    ok!(cuStreamDestroy_v2(a));
    fails!(cuStreamSynchronize(a), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(download(device, 8, b), [4; 8]);
    ok!(cuCtxSynchronize());
    assert_eq!(download(device, 8, b), [3; 8]);
}

#[test]
fn the_host_cannot_read_memory_of_the_device() {
    let _context = Context::new();
    let (device, mut pipe) = (memory(4096), [0; 2]);
    // SAFETY: room for two; a write from memory that cannot be read is an error.
    let (opened, written) = unsafe { (libc::pipe(pipe.as_mut_ptr()), libc::write(pipe[1], device as *const c_void, 1)) };
    assert_eq!((opened, written), (0, -1));
    // SAFETY: opened above.
    unsafe { (libc::close(pipe[0]), libc::close(pipe[1])) };
}

#[test]
fn ranges_are_those_of_one_allocation() {
    let _context = Context::new();
    let (s, first, second) = (stream(), memory(100), memory(100));
    for (at, bytes) in [(first, 101), (first + 100, 1), (second - 100, 8), (second + 99, 2)] {
        fails!(cuMemsetD8Async(at, 0, bytes, s), CUDA_ERROR_INVALID_VALUE);
        fails!(cuMemcpyAsync(first, at, bytes, s), CUDA_ERROR_INVALID_VALUE);
    }
    ok!(cuMemFree_v2(first));
    fails!(cuMemFree_v2(first), CUDA_ERROR_INVALID_VALUE);
    fails!(cuMemFree_v2(second + 1), CUDA_ERROR_INVALID_VALUE);
    let mut address = 0;
    fails!(cuMemAlloc_v2(&mut address, 0), CUDA_ERROR_INVALID_VALUE);
    fails!(cuMemAlloc_v2(&mut address, usize::MAX / 2), CUDA_ERROR_OUT_OF_MEMORY);
    fails!(cuMemHostAlloc(&mut 0, usize::MAX / 2, 0), CUDA_ERROR_OUT_OF_MEMORY);
}

#[test]
fn a_graph_does_what_was_captured_each_time() {
    let _context = Context::new();
    let (s, device, host, mut graph, mut executable) = (stream(), memory(8), page_locked(8), 0, 0);
    ok!(
        cuStreamBeginCapture_v2(s, 1);
        cuMemcpyAsync(device, address(host), 8, s);
        cuMemsetD8Async(device, 9, 4, s);
        cuStreamEndCapture(s, &mut graph);
        cuGraphInstantiateWithFlags(&mut executable, graph, 0);
        cuGraphDestroy(graph);
    );
    assert_eq!(download(device, 8, s), [0xff; 8], "a capture runs nothing");
    for byte in [1, 2] {
        host.fill(byte);
        ok!(cuGraphLaunch(executable, s));
        assert_eq!(download(device, 8, s), [9, 9, 9, 9, byte, byte, byte, byte]);
    }
    ok!(cuGraphExecDestroy(executable));
    fails!(cuGraphLaunch(executable, s), CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn a_capture_does_not_survive_what_it_does_not_permit() {
    let _context = Context::new();
    let (s, device, pageable, mut graph) = (stream(), memory(8), vec![0; 8], 0);
    let forbidden: [&dyn Fn() -> CUresult; 6] = [
        // SAFETY: as everywhere.
        &|| unsafe { cuMemAlloc_v2(&mut 0, 8) },
        // SAFETY: as above.
        &|| unsafe { cuMemFree_v2(device) },
        // SAFETY: as above.
        &|| unsafe { cuStreamSynchronize(s) },
        // SAFETY: as above.
        &|| unsafe { cuCtxSynchronize() },
        // SAFETY: as above.
        &|| unsafe { cuMemsetD8_v2(device, 0, 8) },
        // SAFETY: as above.
        &|| unsafe { cuMemcpyAsync(device, address(&pageable), 8, s) },
    ];
    for call in forbidden {
        ok!(cuStreamBeginCapture_v2(s, 1));
        assert_eq!(call(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        fails!(cuMemsetD8Async(device, 0, 8, s), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        fails!(cuStreamEndCapture(s, &mut graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        ok!(cuStreamSynchronize(s));
    }
    ok!(cuStreamBeginCapture_v2(s, 1));
    fails!(cuStreamBeginCapture_v2(s, 1), CUDA_ERROR_ILLEGAL_STATE);
    ok!(cuStreamEndCapture(s, &mut graph));
    fails!(cuStreamEndCapture(s, &mut graph), CUDA_ERROR_ILLEGAL_STATE);
    fails!(cuStreamBeginCapture_v2(0, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

#[test]
fn launches_that_a_gpu_refuses() {
    let _context = Context::new();
    let (s, nothing) = (stream(), merge(0, 0, 0, 0, 1));
    let merge = function(c"kvlar_merge");
    let wide = function(c"kvlar_append_groups");
    fails!(cuModuleGetFunction(&mut 0, 2, c"no_such_kernel".as_ptr()), CUDA_ERROR_NOT_FOUND);
    fails!(cuModuleLoadData(&mut 0, [0u8; 4].as_ptr().cast()), CUDA_ERROR_INVALID_IMAGE);
    for (grid, block, shared) in [(0, 128, 0), (1, 0, 0), (1, 1025, 0), (1, 128, (48 << 10) + 1)] {
        assert_eq!(launch(merge, grid, block, shared, s, &nothing), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    assert_eq!(launch(wide, 1, 1024, 0, s, &nothing), CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    assert_eq!(launch(1, 1, 128, 0, s, &nothing), CUresult::CUDA_ERROR_INVALID_HANDLE);
    // A function has the shared memory that it asked for, less its own.
    let limit = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
    let mut own = 0;
    ok!(cuFuncGetAttribute(&mut own, FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as c_uint, wide));
    assert!(own > 0);
    fails!(cuFuncSetAttribute(wide, limit, (227 << 10) - own + 1), CUDA_ERROR_INVALID_VALUE);
    ok!(cuFuncSetAttribute(wide, limit, (227 << 10) - own));
}

#[test]
fn a_launch_runs_and_an_address_that_it_cannot_follow_is_the_end() {
    let _context = Context::new();
    let (s, numbers, lse, out, out_lse) = (stream(), memory(16), memory(4), memory(16), memory(4));
    let f = function(c"kvlar_merge");
    let four = [1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat();
    ok!(cuMemcpyAsync(numbers, address(&four), 16, s); cuMemsetD8Async(lse, 0, 4, s));
    assert_eq!(launch(f, 1, 128, 0, s, &merge(numbers, lse, out, out_lse, 4)), OK);
    assert_eq!(download(out, 16, s), four);
    // A struct may say what is not there; that it is not there is found when it is used.
    assert_eq!(launch(f, 1, 128, 0, s, &merge(address(&four), lse, out, out_lse, 4)), OK);
    fails!(cuStreamSynchronize(s), CUDA_ERROR_ILLEGAL_ADDRESS);
    fails!(cuMemAlloc_v2(&mut 0, 8), CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn memory_that_was_freed_is_found() {
    let _context = Context::new();
    let (s, numbers, lse, out, out_lse, mut graph, mut executable) =
        (stream(), memory(16), memory(4), memory(16), memory(4), 0, 0);
    let f = function(c"kvlar_merge");
    ok!(cuStreamBeginCapture_v2(s, 1));
    assert_eq!(launch(f, 1, 128, 0, s, &merge(numbers, lse, out, out_lse, 4)), OK);
    ok!(
        cuStreamEndCapture(s, &mut graph);
        cuGraphInstantiateWithFlags(&mut executable, graph, 0);
        cuMemFree_v2(lse);
        cuGraphLaunch(executable, s);
    );
    fails!(cuStreamSynchronize(s), CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn page_locked_memory_may_go_before_a_copy_of_it() {
    let _context = Context::new();
    let (s, device, host) = (stream(), memory(8), page_locked(8));
    ok!(cuMemcpyAsync(device, address(host), 8, s); cuMemFreeHost(address(host) as usize));
    fails!(cuStreamSynchronize(s), CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn a_thread_has_no_context_until_it_takes_it() {
    let _context = Context::new();
    let (s, mut event) = (stream(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            fails!(cuStreamSynchronize(s), CUDA_ERROR_INVALID_CONTEXT);
            ok!(cuCtxSetCurrent(1); cuStreamSynchronize(s));
        });
    });
    // Events are there when the stream has passed them.
    ok!(cuEventCreate(&mut event, 0));
    fails!(cuEventElapsedTime_v2(&mut 0.0, event, event), CUDA_ERROR_INVALID_HANDLE);
    ok!(cuEventRecord(event, s));
    fails!(cuEventElapsedTime_v2(&mut 0.0, event, event), CUDA_ERROR_NOT_READY);
    ok!(cuStreamSynchronize(s); cuEventElapsedTime_v2(&mut 0.0, event, event); cuEventDestroy_v2(event));
}
