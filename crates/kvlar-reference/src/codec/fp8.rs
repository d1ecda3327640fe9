//! fp8 e4m3 (FP8 Formats for Deep Learning, arXiv 2209.05433 §3): sign, 4 exponent bits with bias 7, 3 of the fraction;
//! no infinities, one NaN of each sign, largest number 448.

/// Largest magnitude of a number.
const MAX: f32 = 448.0;
/// Smallest that is not subnormal.
const MIN_NORMAL: f32 = 1.0 / 64.0;
const NAN: u8 = 0x7f;

/// e4m3 of x / scale, one f32 division; to nearest even, saturating at ±448 (infinities too). NaN keeps its sign, zero too.
pub fn encode_fp8(x: f32, scale: f32) -> u8 {
    let y = x / scale;
    let sign = u8::from(y.is_sign_negative()) << 7;
    let a = y.abs();
    sign | if a.is_nan() {
        NAN
    } else if a > MAX {
        NAN - 1
    } else if a < MIN_NORMAL {
        // In units of 2^-9, the step of subnormals; 8 of them are the smallest normal number, whose code is 8 too.
        (a * 512.0).round_ties_even() as u8
    } else {
        let bits = a.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - ((127 - 7) << 3)) as u8
    }
}

/// scale · the number that a byte stands for, one f32 multiplication.
pub fn decode_fp8(code: u8, scale: f32) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (code & NAN, exponent) {
        (NAN, _) => f32::NAN,
        (_, 0) => fraction / 512.0,
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    scale * if code >> 7 == 0 { magnitude } else { -magnitude }
}
