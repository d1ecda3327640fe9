use super::*;
use crate::Device;

#[test]
fn pools_that_are_too_small_are_refused() {
    let device = Device::reference();
    let data = device.alloc(2 * 3 * 10 * 128).unwrap();
    let rows = Rows::contiguous(None, 10);
    let check = |rows: &Rows<'_>, pool: Pool<View<'_>>| pool.check("k", rows, 2, 3, Stored::row_wise(128, 0));
    check(&rows, Pool::contiguous(data.view(), 3, 10, 128)).unwrap();
    let short = data.view().slice(0..data.len() - 1).unwrap();
    assert!(matches!(check(&rows, Pool::contiguous(short, 3, 10, 128)), Err(Error::Bounds { .. })));
    let odd = data.view().slice(8..data.len()).unwrap();
    assert!(matches!(check(&Rows::contiguous(None, 9), Pool::contiguous(odd, 3, 9, 128)), Err(Error::Alignment { .. })));
    assert!(matches!(check(&rows, Pool::contiguous(data.view(), 3, 10, 120)), Err(Error::Alignment { .. })));
}

#[test]
fn tables_are_bounded() {
    let device = Device::reference();
    let (table, lengths) = (device.alloc(4 * 2 * 5).unwrap(), device.alloc(8).unwrap());
    let rows = Rows::block_table(table.view(), 5, lengths.view(), 16).unwrap();
    rows.check("k", 2, (4, 4), 7).unwrap();
    assert!(matches!(rows.check("k", 3, (4, 4), 7), Err(Error::Bounds { arg: "page table", .. })));
    assert!(matches!(Rows::block_table(table.view(), 5, lengths.view(), 24), Err(Error::Invalid { .. })));
    assert!(matches!(Rows::block_table(table.view(), 5, lengths.view(), 8), Err(Error::Invalid { .. })));
}
