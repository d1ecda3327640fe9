//! Codes of a few bits in bytes.

use crate::error::{ReferenceError, value};

fn check(bits: usize) -> Result<(), ReferenceError> {
    if matches!(bits, 2 | 4 | 8) { Ok(()) } else { value("bits", format!("{bits} is none of 2, 4 and 8")) }
}

/// Packs codes of `bits` bits (2, 4 or 8), the lowest bits of a byte first; bits that no code fills are 0.
///
/// # Errors
/// Another width, a code that does not fit.
pub fn pack_codes(codes: &[u8], bits: usize) -> Result<Vec<u8>, ReferenceError> {
    check(bits)?;
    if let Some(wide) = codes.iter().find(|&&c| u32::from(c) >> bits != 0) {
        return value("codes", format!("{wide} does not fit {bits} bits"));
    }
    Ok(codes.chunks(8 / bits).map(|byte| byte.iter().enumerate().fold(0, |all, (i, c)| all | c << (i * bits))).collect())
}

/// The first `count` codes of `bits` bits, one a byte.
///
/// # Errors
/// A width other than 2, 4 and 8, too few bytes.
pub fn unpack_codes(bytes: &[u8], count: usize, bits: usize) -> Result<Vec<u8>, ReferenceError> {
    check(bits)?;
    if bytes.len() < (count * bits).div_ceil(8) {
        return value("codes", format!("{} bytes are too few for {count} codes of {bits} bits", bytes.len()));
    }
    let mask = u8::MAX >> (8 - bits);
    Ok(bytes.iter().flat_map(|byte| (0..8).step_by(bits).map(move |shift| byte >> shift & mask)).take(count).collect())
}
