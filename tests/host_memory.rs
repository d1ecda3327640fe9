//! Memory of the host that the device reaches: it holds what memory of the device would, and copies between the two move just
//! what they are told to, when it is their turn.

use kvlar::{Buffer, Device, Error, MergeShape};
use kvlar_reference::testing::Rng;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    it_begins_zeroed_and_keeps_what_it_is_given,
    copies_move_their_range_alone,
    the_host_waits_for_what_reads_there,
    what_is_uploaded_may_be_page_locked,
    memory_that_is_dropped_has_been_read,
    nothing_is_no_error,
    captured_copies_move_what_is_there_at_a_replay,
    an_op_reads_and_writes_there
);

fn bytes(lab: &Lab, buffer: &Buffer) -> Vec<u8> {
    lab.download(buffer)
}

fn on_host(lab: &Lab, content: &[u8]) -> Buffer {
    let mut buffer = lab.device.alloc_host(content.len()).expect("memory of the host");
    lab.stream.upload(&mut buffer, 0, content).expect("an upload");
    buffer
}

fn counting(from: u8, count: usize) -> Vec<u8> {
    (0..count).map(|i| from.wrapping_add(i as u8)).collect()
}

fn it_begins_zeroed_and_keeps_what_it_is_given(lab: &Lab) {
    for size in [1, 255, 4097] {
        let mut host = lab.device.alloc_host(size).expect("memory of the host");
        assert!(host.is_on_host() && host.len() == size && host.address().is_multiple_of(256));
        assert!(bytes(lab, &host).iter().all(|&b| b == 0));
        lab.stream.fill(&mut host, 0..size, 7).expect("a fill");
        lab.stream.upload(&mut host, size / 2, &[9]).expect("an upload");
        let mut expected = vec![7; size];
        expected[size / 2] = 9;
        assert_eq!(bytes(lab, &host), expected);
    }
    assert!(!lab.device.alloc(1).expect("memory").is_on_host());
    assert!(lab.device.alloc_host(0).expect("nothing").is_empty());
}

fn copies_move_their_range_alone(lab: &Lab) {
    let from = counting(1, 300);
    let there = |host: bool| if host { on_host(lab, &from) } else { lab.upload(&from) };
    for (from_host, to_host) in [(true, false), (false, true), (true, true), (false, false)] {
        let (source, mut target) = (there(from_host), there(to_host));
        lab.stream.fill(&mut target, 0..300, 0xee).expect("a fill");
        lab.stream.copy(&source, 17..150, &mut target, 101).expect("a copy");
        lab.stream.copy(&source, 5..5, &mut target, 300).expect("a copy of nothing");
        let mut expected = vec![0xee; 300];
        expected[101..234].copy_from_slice(&from[17..150]);
        assert_eq!(bytes(lab, &target), expected, "from the host: {from_host}, to the host: {to_host}");
        assert_eq!(bytes(lab, &source), from);
    }
}

/// As an engine's own may be: it may be changed at once all the same.
fn what_is_uploaded_may_be_page_locked(lab: &Lab) {
    let (source, mut target) = (on_host(lab, &[1; 64]), lab.upload(&[0u8; 64]));
    // SAFETY: memory of the host, which nothing else uses until the end of this function.
    let slice = unsafe { std::slice::from_raw_parts_mut(source.address() as *mut u8, 64) };
    lab.stream.upload(&mut target, 0, slice).expect("an upload");
    slice.fill(2);
    assert_eq!(bytes(lab, &target), [1; 64]);
    lab.stream.download(&target, 0, slice).expect("a download");
    assert_eq!(slice, [1; 64]);
}

/// What is enqueued reads what was there then.
fn the_host_waits_for_what_reads_there(lab: &Lab) {
    let (mut source, mut target) = (on_host(lab, &[1; 64]), lab.upload(&[0u8; 64]));
    lab.stream.copy(&source, 0..64, &mut target, 0).expect("a copy");
    lab.stream.upload(&mut source, 0, &[2; 64]).expect("an upload");
    assert_eq!(bytes(lab, &target), [1; 64]);
    lab.stream.copy(&source, 0..64, &mut target, 0).expect("a copy");
    lab.stream.fill(&mut source, 0..64, 3).expect("a fill");
    assert_eq!(bytes(lab, &target), [2; 64]);
}

fn nothing_is_no_error(lab: &Lab) {
    let memory = [lab.device.alloc(0), lab.device.alloc_host(0), lab.device.alloc(8)];
    for mut buffer in memory.map(|m| m.expect("memory")) {
        let end = buffer.len();
        lab.stream.fill(&mut buffer, end..end, 1).expect("a fill of nothing");
        lab.stream.upload(&mut buffer, end, &[]).expect("an upload of nothing");
        lab.stream.download(&buffer, end, &mut []).expect("a download of nothing");
        lab.stream.copy_within(&mut buffer, 0..0, end).expect("a copy of nothing");
    }
}

fn memory_that_is_dropped_has_been_read(lab: &Lab) {
    for host in [true, false] {
        let mut target = lab.upload(&[0u8; 64]);
        let source = if host { on_host(lab, &[5; 64]) } else { lab.upload(&[5u8; 64]) };
        lab.stream.copy(&source, 0..64, &mut target, 0).expect("a copy");
        drop(source);
        assert_eq!(bytes(lab, &target), [5; 64], "of the host: {host}");
    }
}

/// To the device, within it, and back: one after the other, at each replay anew.
fn captured_copies_move_what_is_there_at_a_replay(lab: &Lab) {
    let stream = &lab.stream;
    let (mut source, mut middle, mut back) = (on_host(lab, &[0; 64]), lab.upload(&[0xeeu8; 64]), on_host(lab, &[0xee; 64]));
    let graph = stream.capture(|stream| {
        stream.copy(&source, 0..32, &mut middle, 8)?;
        stream.copy_within(&mut middle, 8..24, 40)?;
        stream.copy(&middle, 0..64, &mut back, 0)
    });
    let graph = graph.expect("a graph");
    assert_eq!(bytes(lab, &back), [0xee; 64], "a capture runs nothing");
    for first in [1, 90] {
        stream.upload(&mut source, 0, &counting(first, 64)).expect("an upload");
        // SAFETY: the buffers live here, and nothing else uses them.
        unsafe { graph.launch(stream) }.expect("a replay");
        stream.synchronize().expect("a result");
        let mut expected = [0xee; 64];
        expected[8..40].copy_from_slice(&counting(first, 32));
        expected[40..56].copy_from_slice(&counting(first, 16));
        assert_eq!(bytes(lab, &back), expected, "from {first}");
    }
}

/// Inputs and outputs of the host give the bits that those of the device give.
fn an_op_reads_and_writes_there(lab: &Lab) {
    let (parts, rows, dim) = (3, 5, 24);
    let mut rng = Rng::new(5);
    let (values, lse) = (rng.normals(parts * rows * dim, 1.0), rng.normals(parts * rows, 2.0));
    let plan = MergeShape { parts, rows, dim }.plan(&lab.device).expect("a plan");
    let merged = |host: bool| -> [Vec<u8>; 2] {
        let place = |content: &[u8]| if host { on_host(lab, content) } else { lab.upload(content) };
        let (p, l) = (place(bytemuck::cast_slice(&values)), place(bytemuck::cast_slice(&lse)));
        let (mut out, mut out_lse) = (place(&vec![0xff; 4 * rows * dim]), place(&vec![0xff; 4 * rows]));
        plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut out_lse.view_mut()).expect("merge");
        [bytes(lab, &out), bytes(lab, &out_lse)]
    };
    assert_eq!(merged(true), merged(false));
}

#[test]
fn copies_that_cannot_be_are_errors() {
    let (a, b) = (Lab::reference(), Lab::reference());
    let (mut own, mut foreign) = (a.device.alloc_host(16).unwrap(), b.device.alloc(16).unwrap());
    let device = Error::Mismatch { arg: "buffer", what: "device" };
    assert_eq!(a.stream.copy(&foreign, 0..4, &mut own, 0).unwrap_err(), device);
    assert_eq!(a.stream.copy(&own, 0..4, &mut foreign, 0).unwrap_err(), device);
    let mut other = a.device.alloc(8).unwrap();
    for (range, to) in [(0..17, 0), (12..17, 0), (0..8, 1), (0..1, usize::MAX)] {
        assert!(matches!(a.stream.copy(&own, range, &mut other, to), Err(Error::Bounds { .. })));
    }
    assert!(matches!(Device::reference().alloc_host(usize::MAX / 4), Err(Error::OutOfMemory { .. })));
}
